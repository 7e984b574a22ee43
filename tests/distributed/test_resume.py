"""A resumed run is the uninterrupted one: bit for bit on the same engine, to 1e-5 on any other."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import resume_worker
from tests.helpers import TINY_BERT, Launcher, jsonl, tiny_flags

DROPOUT = json.dumps(TINY_BERT | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
EVERY = {"checkpoint.every": "5 steps", "checkpoint.keep_last": "20"}
SETUPS = [("ddp", 1), ("ddp", 2), ("zero1", 4), ("zero2", 2), ("zero3", 3), ("fsdp2", 3)]


def logged(output_dir: Path) -> list[dict[str, Any]]:
    """What was logged, without the figures of a clock."""
    names = ("kind", "step", "epoch", "loss", "grad_norm", "learning_rate", "exact_match", "f1", "train_loss")
    return [{name: line[name] for name in names if name in line} for line in jsonl(output_dir / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("engine", "processes", "precision"),
    [
        ("ddp", 1, "no"),
        ("ddp", 2, "no"),
        ("zero2", 2, "no"),
        ("zero3", 3, "bf16"),
        ("fsdp2", 3, "no"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *(("zero0", 2, "no"), ("zero1", 2, "no"), ("zero3", 2, "no"), ("zero3", 3, "no"), ("fsdp2", 2, "no")),
                *(("ddp", 2, "bf16"), ("zero2", 2, "bf16"), ("fsdp2", 2, "bf16")),
            ]
        ),
    ],
)
def test_bit_for_bit_on_the_same_engine(
    engine: str, processes: int, precision: str, launcher: Launcher, tmp_path: Path
):
    """From the middle of the first epoch, with dropout, accumulation, and a figure that is logged every third step."""
    flags = tiny_flags(**EVERY, **{"model.config": DROPOUT, "train.micro_batch_size": "3", "run.log_every": "3"})
    launch = launcher.train(engine, processes, tmp_path / "whole", *flags, mixed_precision=precision)
    assert launch.code == 0, launch.output
    checkpoint = tmp_path / "whole/checkpoints/step_00000005"
    resume = ("--resume", str(checkpoint))
    launch = launcher.train(engine, processes, tmp_path / "rest", *flags, *resume, mixed_precision=precision)
    assert launch.code == 0, launch.output
    assert f"going on from {checkpoint} (step 5)" in launch.output
    rest, whole = logged(tmp_path / "rest"), logged(tmp_path / "whole")
    assert len(rest) > 5
    assert rest == [line for line in whole if line["step"] > 5]
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("rest", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    figures = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("rest", "whole")]
    assert figures[0]["history"] == figures[1]["history"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engine and world size -> a run with checkpoints, without dropout."""
    runs = {}
    for engine, processes in SETUPS:
        directory = tmp_path_factory.mktemp(f"{engine}-{processes}")
        flags = tiny_flags(**EVERY, **{"train.epochs": "1"})
        launch = Launcher(directory).train(engine, processes, directory / "run", *flags)
        assert launch.code == 0, launch.output
        runs[f"{engine}-{processes}"] = directory / "run"
    return runs


@pytest.mark.parametrize(("engine", "processes"), SETUPS)
def test_any_engine_takes_any_checkpoint(
    engine: str, processes: int, saved: dict[str, Path], launcher: Launcher, tmp_path: Path
):
    result = tmp_path / "result.json"
    paths = [run / "checkpoints/step_00000005" for run in saved.values()]
    launch = launcher.run(engine, processes, "-m", resume_worker.__name__, str(result), *map(str, paths))
    assert launch.code == 0, launch.output
    found = json.loads(result.read_text())
    expected = [line["loss"] for line in logged(saved["ddp-1"]) if line["kind"] == "train"][5 : 5 + resume_worker.STEPS]
    assert len(expected) == resume_worker.STEPS
    for name, path in zip(saved, paths, strict=True):
        assert found[str(path)] == pytest.approx(expected, abs=1e-5), name


def test_checkpoints_hold_tensors_and_json_alone(saved: dict[str, Path]):
    """The same names whichever engine wrote them; shares of about the same size; nothing that could be executed."""
    for name, run in saved.items():
        directory = run / "checkpoints/step_00000005"
        world_size = int(name[-1])
        shards = sorted(directory.glob("*.safetensors"))
        others = {path.name for path in directory.iterdir()} - {path.name for path in shards}
        assert others == {
            *("manifest.json", "config.json", "qa_dist.json", "tokenizer.json", "tokenizer_config.json"),
            "metrics.jsonl",
        }
        assert len(shards) == world_size
        tensors = {key: tensor for path in shards for key, tensor in load_file(path).items()}
        manifest = json.loads((directory / "manifest.json").read_text())
        assert others | {path.name for path in shards} == {"manifest.json", *manifest["files"]}
        assert (manifest["step"], manifest["launch"]["world_size"]) == (5, world_size)
        assert {key.partition(":")[0] for key in tensors} == manifest["tensors"].keys()
        weights = {key.partition("/")[2] for key in manifest["tensors"]}
        kinds = ("weight", "exp_avg", "exp_avg_sq")
        assert {f"{kind}/{one}" for kind in kinds for one in weights} == manifest["tensors"].keys()
        assert weights == load_file(run / "model/model.safetensors").keys()
        values = sum(tensor.numel() for tensor in tensors.values())
        assert values == sum(math.prod(spec["shape"]) for spec in manifest["tensors"].values())  # each value once
        sizes = [path.stat().st_size for path in shards]
        assert sum(sizes) < 1.02 * 4 * values + 40_000  # 40 kB of headers, which a real model does not notice
        assert max(sizes) < 1.5 * min(sizes)
