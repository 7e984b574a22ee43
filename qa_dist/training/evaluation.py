"""Evaluation over all ranks, in which each feature counts exactly once."""

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qa_dist.errors import TrainingError
from qa_dist.tasks.ragged import ranges
from qa_dist.tasks.task import FeatureSet, Score, Task
from qa_dist.training.batching import evaluation_batches
from qa_dist.training.engine import Engine
from qa_dist.training.preemption import StopRequest

Outputs = dict[str, npt.NDArray[Any]]


def evaluate(engine: Engine, task: Task, features: FeatureSet, batch_size: int, stop: StopRequest) -> Score:
    """Run the model over all features and score what it says; features without labels get no metrics. The main process
    scores; every rank gets the metrics, only the main process the files.

    Raises `TrainingError` for a model whose loss is no number, and `StoppedError` on request.
    """
    outputs = collect(engine, task, features, batch_size, stop)
    score = Score({})

    def score_all() -> None:
        nonlocal score
        loss = float(outputs.pop("loss").astype(np.float64).mean())  # of no meaning, but finite, without labels
        if not np.isfinite(loss):
            raise TrainingError(f"the validation loss is {loss}: the model's weights are not usable")
        score = task.score(outputs, features)
        if features.labelled:
            score.metrics["loss"] = loss

    engine.on_main(score_all)
    score.metrics = engine.broadcast(score.metrics)
    return score


def collect(engine: Engine, task: Task, features: FeatureSet, batch_size: int, stop: StopRequest) -> Outputs:
    """The task's outputs and the loss of every feature, in the order of `features`: each [num_features, …], or, per
    token, [lengths.sum()].

    On the main process; the others return empty arrays. Raises `RuntimeError` if a feature is missing or came
    twice, which would be a bug.
    """
    batches = evaluation_batches(features.lengths, batch_size)
    placed = _Placed(features.lengths, task.per_token)
    engine.model.eval()
    like = () if engine.is_compiled else ("training",)  # a compiled model is compiled again to be evaluated
    for first in range(0, len(batches), engine.world_size):
        # In the last round there may be fewer batches than ranks. All must still run, and together, since a
        # sharded model is gathered for each forward pass: the surplus ranks start again from the first batch.
        engine.watchdog.step(f"the evaluation, batch {first + 1} of {len(batches)}", "evaluation", *like)
        stop.raise_if_any(engine)
        real = min(engine.world_size, len(batches) - first)
        on_host = engine.staged(features.collate(batches[(first + engine.rank) % len(batches)], engine.multiple))
        with torch.no_grad():
            output, batch = engine.forward(on_host)
            rows = {**task.outputs(output, batch), "loss": task.loss(output, batch)}
        index = engine.gather_rows(batch.index, fill=-1)[:real].flatten()
        gathered = {
            name: engine.gather_rows(tensor, fill=0, widen=task.per_token.get(name))[:real].flatten(0, 1)
            for name, tensor in rows.items()
        }
        if engine.is_main:
            placed.add(index, gathered)
    engine.model.train()
    engine.watchdog.phase("scoring")
    if engine.is_main:
        placed.require_complete()
    return placed.arrays


class _Placed:
    """Rows put where their feature's index says, and counted."""

    def __init__(self, lengths: npt.NDArray[np.int64], per_token: Collection[str]):
        self.arrays: Outputs = {}
        self.count = np.zeros(len(lengths), dtype=np.int64)
        self.lengths = lengths
        self.per_token = per_token
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        """Where the tokens of each feature begin, in a row of all."""

    def add(self, index: Tensor, rows: dict[str, Tensor]) -> None:
        """`index` [n] is -1 for rows that only fill up a rank's share; `rows` are [n, …]."""
        is_row = index >= 0
        places = index[is_row].cpu().numpy()
        np.add.at(self.count, places, 1)
        for name, tensor in rows.items():
            values = tensor[is_row].cpu().numpy()
            if name in self.per_token:
                if name not in self.arrays:
                    self.arrays[name] = np.zeros(self.offsets[-1], dtype=values.dtype)
                is_token = np.arange(values.shape[1]) < self.lengths[places][:, None]
                self.arrays[name][ranges(self.offsets[places], self.lengths[places])] = values[is_token]
                continue
            if name not in self.arrays:
                self.arrays[name] = np.zeros((len(self.count), *values.shape[1:]), dtype=values.dtype)
            self.arrays[name][places] = values

    def require_complete(self) -> None:
        if (self.count != 1).any():
            missing, repeated = int((self.count == 0).sum()), int((self.count > 1).sum())
            raise RuntimeError(
                f"evaluation lost {missing} of {len(self.count)} features and counted {repeated} more than once"
            )
