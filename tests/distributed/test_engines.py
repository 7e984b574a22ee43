"""The same training on every engine and world size: same global batches, same losses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import Launcher, jsonl, tiny_flags

# 45 examples in batches of 8: the last one of each epoch is short. Micro-batches of 3 make uneven accumulation.
FLAGS = tiny_flags(**{"train.micro_batch_size": "3", "train.epochs": "2"})


def losses(output_dir: Path) -> list[float]:
    return [line["loss"] for line in jsonl(output_dir / "metrics.jsonl") if line["kind"] == "train"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: one process, no sharding, no accumulation."""
    directory = tmp_path_factory.mktemp("alone")
    launch = Launcher(directory).train("ddp", 1, directory / "run", *tiny_flags(**{"train.epochs": "2"}))
    assert launch.code == 0, launch.output
    return directory / "run"


@pytest.mark.parametrize(
    ("engine", "processes"),
    [
        ("ddp", 2),
        ("zero2", 3),
        ("zero3", 3),
        ("fsdp2", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *(("ddp", 4), ("zero0", 2), ("zero1", 2), ("zero2", 1), ("zero2", 2), ("zero3", 4)),
                *(("zero3_offload", 2), ("fsdp2", 2)),
            ]
        ),
    ],
)
def test_losses_follow_the_same_curve(engine: str, processes: int, alone: Path, launcher: Launcher, tmp_path: Path):
    launch = launcher.train(engine, processes, tmp_path / "run", *FLAGS)
    assert launch.code == 0, launch.output
    expected = losses(alone)
    assert len(expected) > 10
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=0, abs=1e-5)
    history = [json.loads((d / "metrics.json").read_text())["history"] for d in (alone, tmp_path / "run")]
    assert [row["loss"] for row in history[1]] == pytest.approx([row["loss"] for row in history[0]], abs=1e-5)
    name = {"ddp": "DDP", "fsdp2": "FSDP2"}.get(engine, f"ZeRO-{engine[4:5]}")
    assert name in launch.output


@pytest.mark.parametrize(
    "engine",
    ["zero2", "fsdp2", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)],
)
def test_bf16_follows_float32(engine: str, alone: Path, launcher: Launcher, tmp_path: Path):
    launch = launcher.train(engine, 2, tmp_path / "run", *FLAGS, mixed_precision="bf16")
    assert launch.code == 0, launch.output
    assert "bf16" in launch.output
    found, expected = losses(tmp_path / "run"), losses(alone)
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    weights = load_file(tmp_path / "run/model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}  # the master weights
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())


def test_every_engine_trains_on_fewer_examples_than_processes(launcher: Launcher, tmp_path: Path):
    flags = tiny_flags(
        **{
            "data.synthetic.train_examples": "3",
            "data.synthetic.validation_examples": "1",
            "data.synthetic.long_share": "0",
        }
    )
    launch = launcher.train("zero3", 4, tmp_path / "run", *flags)
    assert launch.code == 0, launch.output
    assert len(losses(tmp_path / "run")) == 2


def test_weights_that_the_model_does_not_use_hold_nothing_up(launcher: Launcher, tmp_path: Path):
    """XLNet has an embedding of masks that answers never touch: DDP waits for such gradients, and AdamW has no moments
    for them to store."""
    xlnet = {"model_type": "xlnet", "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64}
    flags = tiny_flags(**{"model.config": json.dumps(xlnet), "train.epochs": "1"})
    first = launcher.train("ddp", 2, tmp_path / "run", *flags)
    assert first.code == 0, first.output
    assert "not trained, as the model makes no use of them: transformer.mask_emb" in first.output
    second = launcher.train("zero2", 1, tmp_path / "on", *flags, "--resume", str(tmp_path / "run"))
    assert second.code == 0, second.output
