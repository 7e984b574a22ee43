"""Settings that change how fast and how lean training is, but not what is learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qa_dist.cli import main
from tests.helpers import TINY_BERT, Launcher, jsonl, tiny_flags


def train(output_dir: Path, **changes: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of the steps of a run in this process."""
    with pytest.raises(SystemExit) as exit_:
        main(["train", *tiny_flags(**changes), "--run.output_dir", str(output_dir)])
    assert exit_.value.code == 0
    return [line for line in jsonl(output_dir / "metrics.jsonl") if line["kind"] == "train"]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    "setting", ["train.gradient_checkpointing", pytest.param("train.compile", marks=pytest.mark.slow)]
)
def test_the_losses_stay_the_same(setting: str, plain: list[dict[str, Any]], tmp_path: Path):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    lines = train(tmp_path / "run", **{setting: "true"})
    assert losses(lines) == pytest.approx(losses(plain), abs=1e-4)
    if setting == "train.compile":
        graphs = counters["stats"]["unique_graphs"]
        # lengths up to 96 are two buckets, in training and evaluation, with whole and short batches
        assert 1 <= graphs <= 8, counters
        assert max(line["padding"] for line in lines) > max(line["padding"] for line in plain)


def test_a_model_that_cannot_checkpoint_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    from transformers import BertForQuestionAnswering

    monkeypatch.setattr(BertForQuestionAnswering, "supports_gradient_checkpointing", False)
    with pytest.raises(SystemExit) as exit_:
        flags = tiny_flags(**{"train.gradient_checkpointing": "true"})
        main(["train", *flags, "--run.output_dir", str(tmp_path / "run")])
    assert exit_.value.code == 2
    assert "models of type 'bert' cannot; leave it off" in capsys.readouterr().err


def test_steps_of_tokens(tmp_path: Path, launcher: Launcher):
    """The same steps on one process and on two, with about as many tokens each."""
    flags = tiny_flags(**{"train.global_batch_size": "", "train.tokens_per_batch": "500"})
    runs = []
    for processes in (1, 2):
        output = tmp_path / f"run-{processes}"
        launch = launcher.train("ddp", processes, output, *flags)
        assert launch.code == 0, launch.output
        runs.append([line for line in jsonl(output / "metrics.jsonl") if line["kind"] == "train"])
    alone, shared = runs
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-5)
    status = json.loads((tmp_path / "run-2/status.json").read_text())
    assert status["step"] == len(shared)


def test_figures_of_health(plain: list[dict[str, Any]]):
    for line in plain:
        assert 0 <= line["padding"] < 0.6
        assert line["tokens_per_second"] > line["samples_per_second"] > 0
        assert line["peak_memory_gib"] > 0.05
        assert line["skipped_steps"] == 0
        assert 0 <= line["data_seconds"] < 60
    assert "model_flops_utilization" not in plain[0]  # not known for a CPU


def test_a_bert_without_enough_positions_is_told_before_the_first_step(tmp_path: Path, capsys):
    flags = tiny_flags(**{"model.config": json.dumps(TINY_BERT | {"max_position_embeddings": 64})})
    with pytest.raises(SystemExit) as exit_:
        main(["train", *flags, "--run.output_dir", str(tmp_path / "run")])
    assert exit_.value.code == 2
    assert "data.max_length: 96 is more than the 64 positions" in capsys.readouterr().err
