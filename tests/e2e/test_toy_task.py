"""What it takes to teach the training system something else: a task of twenty lines, through the real loop."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from qa_dist import tasks
from qa_dist.config import RunConfig
from qa_dist.reporting.model_card import model_card
from qa_dist.reporting.report import write_report
from qa_dist.tasks.task import Batch, FeatureSet, Score, Task
from qa_dist.tasks.tokenizer import train_tokenizer
from qa_dist.training import session
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.resume import Resume
from tests.helpers import TINY_BERT, jsonl


class Rows(FeatureSet):
    lengths = np.full(64, 6)

    def collate(self, indices: Any, multiple: int = 8) -> Batch:
        ids = torch.stack([torch.arange(5, 11) + 7 * (int(i) % 2) for i in indices])
        return Batch({"input_ids": ids}, {"odd": torch.as_tensor(indices) % 2}, torch.as_tensor(indices))


class OddOrEven(Task):
    name, auto_model = "odd_or_even", AutoModelForSequenceClassification
    best_metric, headline = "accuracy", {"accuracy": "accuracy", "loss": "validation loss"}
    per_token: ClassVar[dict[str, int]] = {"ids": -1}

    def __init__(self, config: RunConfig):
        self.tokenizer = train_tokenizer(["odd or even"], 300, {})

    def features(self, split: str) -> FeatureSet:
        return Rows()

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(output.logits.float(), batch.targets["odd"], reduction="none")

    def outputs(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        return {"odd": output.logits.argmax(dim=1), "ids": batch.inputs["input_ids"]}

    def score(self, outputs: dict[str, Any], features: FeatureSet) -> Score:
        return Score(
            {"accuracy": 100.0 * float((outputs["odd"] == np.arange(64) % 2).mean())},
            {"o.json": outputs["ids"].tolist()},
        )


def test_a_task_of_twenty_lines_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(tasks.TASKS, OddOrEven.name, (__name__, OddOrEven.__name__))
    settings = {
        "model": {"config": TINY_BERT},
        "data": {"max_length": 16, "stride": 4},
        "train": {"epochs": 2, "global_batch_size": 8, "learning_rate": 1e-2},
        "run": {"output_dir": tmp_path / "run", "log_every": 1},
    }
    config = RunConfig.model_validate(settings).model_copy(update={"task": OddOrEven.name})
    session.train(config, LaunchEnvironment.read(), Resume())
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["accuracy"] == 100.0
    assert json.loads((tmp_path / "run/o.json").read_text())[:12] == [*range(5, 11), *range(12, 18)]
    losses = [row["loss"] for row in jsonl(tmp_path / "run/metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < 0.1 < losses[0]
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")

    evaluated = {"model": {"name": str(tmp_path / "run/model")}, "run": {"output_dir": tmp_path / "again"}}
    config = RunConfig.model_validate(settings | evaluated).model_copy(update={"task": OddOrEven.name})
    session.evaluate_only(config, LaunchEnvironment.read())
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert again == {name: metrics[name] for name in again}
    assert model_card(tmp_path / "run", "user/toy").startswith("---")
    assert Path(write_report(tmp_path / "run", None, None, print)).is_file()
