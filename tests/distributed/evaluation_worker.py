"""Collects the outputs of a toy task for many sizes of the evaluation set, and checks that each feature counts once."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from qa_dist.tasks.task import Batch
from qa_dist.training.engine import Engine
from qa_dist.training.evaluation import collect
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.preemption import StopRequest
from tests.helpers import Numbered

BATCH_SIZE = 3


class Numbers(Numbered):
    """Feature i is the number i, as often as its length says."""

    def __init__(self, count: int):
        self.lengths = 1 + np.arange(count) * 7 % 11

    def collate(self, indices, multiple: int = 8) -> Batch:
        width = int(self.lengths[indices].max())
        rows = [[int(i)] * int(self.lengths[i]) + [0] * (width - int(self.lengths[i])) for i in indices]
        return Batch({"x": torch.tensor(rows)}, {}, torch.from_numpy(np.asarray(indices, dtype=np.int64)))


class SumTask:
    """The output is the sum of the feature's numbers, as a figure and as a vector, and each of the numbers."""

    per_token: ClassVar[dict[str, int]] = {"numbers": -7}

    def loss(self, output: Any, batch: Batch) -> torch.Tensor:
        return output.sum.float() / 2

    def outputs(self, output: Any, batch: Batch) -> dict[str, torch.Tensor]:
        numbers = torch.where(batch.inputs["x"] == 0, -7, batch.inputs["x"])  # nothing may depend on the padding
        return {"sum": output.sum, "vector": output.sum[:, None] * torch.arange(1, 4), "numbers": numbers}


class Sum(torch.nn.Module):
    calls = 0

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(sum=x.sum(dim=1))


def main() -> None:
    engine = Engine(LaunchEnvironment.read(), timeout_minutes=5)
    checked = 0
    for count in range(1, 3 * engine.world_size * BATCH_SIZE + 2):
        features = Numbers(count)
        model = Sum()
        engine.model = model
        outputs = collect(engine, SumTask(), features, BATCH_SIZE, StopRequest())  # pyright: ignore[reportArgumentType]
        calls = engine.broadcast(model.calls)
        assert model.calls == calls, "ranks ran a different number of forward passes"
        if engine.is_main:
            expected = np.arange(count) * features.lengths
            assert (outputs["sum"] == expected).all(), (count, outputs)
            assert (outputs["vector"] == expected[:, None] * np.arange(1, 4)).all()
            assert (outputs["loss"] == expected / 2).all()
            numbers = np.repeat(np.arange(count), features.lengths)
            assert outputs["numbers"][features.lengths[0] :].tolist() == numbers[features.lengths[0] :].tolist()
            checked += 1
    if engine.is_main:
        Path(sys.argv[1]).write_text(json.dumps({"world_size": engine.world_size, "checked": checked}))
    engine.close()
    sys.stdout.flush()
    os._exit(0)  # as qa_dist/__main__.py does, and says why


if __name__ == "__main__":
    main()
