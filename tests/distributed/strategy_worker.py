"""On a real engine: gradients that are not finite, and a search for a micro-batch that only one rank limits."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from qa_dist.checkpoint.state import HostCopies, full_weights, tensor_specs
from qa_dist.checkpoint.writer import CheckpointWriter, Retention
from qa_dist.config import OutputConfig, RunConfig
from qa_dist.errors import UserError
from qa_dist.training.batching import plan_epoch
from qa_dist.training.engine import Engine
from qa_dist.training.evaluation import collect
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.micro_batch import halved_until
from qa_dist.training.preemption import StopRequest
from qa_dist.training.resume import DIRECTORY, Resume, find, load
from qa_dist.training.step import Step
from qa_dist.training.strategies import NonFiniteGradientError
from tests.distributed.evaluation_worker import Numbers, SumTask
from tests.helpers import make_manifest


class Spoiled(torch.autograd.Function):
    """The identity, whose gradient is infinite on request."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, spoiled: bool) -> torch.Tensor:
        ctx.spoiled = spoiled
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * (float("inf") if ctx.spoiled else 1.0), None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])

    def forward(self, x: torch.Tensor, spoiled: bool = False) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return Spoiled.apply(x, spoiled)  # pyright: ignore[reportReturnType]


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    found = full_weights(engine.strategy, engine.is_main)
    return engine.broadcast(found) or {}


def step(engine: Engine, spoiled: bool) -> float:
    engine.set_learning_rate(0.1)
    x = torch.full((2, 4), 1.0 + engine.rank)
    with engine.strategy.accumulating(last=True):
        engine.strategy.backward(engine.model(x, spoiled=spoiled).sum())
    return engine.strategy.update().grad_norm


def spoiled_gradient(engine: Engine) -> dict[str, Any]:
    """One good step, one whose gradient is infinite on rank 1 alone, and a good one."""
    config = RunConfig()
    engine.prepare(Model(), config)
    norm = step(engine, spoiled=False)
    before = weights(engine)
    try:
        step(engine, spoiled=engine.rank == engine.world_size - 1)
        raised = False
    except NonFiniteGradientError:
        raised = True
    after = weights(engine)
    kept = all(torch.equal(before[name], after[name]) for name in before)
    return {"norm": norm, "raised": raised, "kept": kept, "names": sorted(after)}


def limited_micro_batch(engine: Engine) -> dict[str, Any]:
    """Rank 1 has less room than the others; and then none at all."""
    tried: list[int] = []

    def fits(limit: int, size: int) -> bool:
        tried.append(size)
        return size <= limit

    size = halved_until(12, lambda size: fits(3 if engine.rank == 1 else 100, size), engine)
    try:
        halved_until(2, lambda size: engine.rank != 1, engine)
        message = ""
    except UserError as error:
        message = str(error)
    return {"size": size, "tried": tried, "message": message}


class Scaled(nn.Module):
    """A weight times the sum of each feature's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1, bias=False)])

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sum=self.layers[0](x.sum(dim=1, keepdim=True).float())[:, 0])


def sweep(engine: Engine) -> dict[str, Any]:
    """Train and evaluate for every size of the data, of batches and of micro-batches: nobody may wait for ever."""
    config = RunConfig.model_validate({"train": {"learning_rate": 1e-9}})
    model = Scaled()
    nn.init.ones_(model.layers[0].weight)  # pyright: ignore[reportArgumentType]
    engine.prepare(model, config)
    task: Any = SumTask()
    steps = evaluations = 0
    for count in range(1, 2 * engine.world_size + 4):
        features = Numbers(count)
        for batch_size in (1, engine.world_size, 2 * engine.world_size + 1):
            for micro in (1, 3):
                step = Step(config.train, engine, task, features, micro, StopRequest())
                losses = 0.0
                plan = plan_epoch(features.lengths, seed=0, epoch=count, global_batch_size=batch_size)
                for number, batch in enumerate(plan):
                    losses += step.run(number, 1e-9, batch, step.collate(batch)).loss * len(batch)
                    steps += 1
                expected = (np.arange(count) * features.lengths).sum() / 2
                assert abs(losses - expected) < 1e-3 * max(expected, 1), (count, batch_size, micro, losses, expected)
            collect(engine, task, features, batch_size, StopRequest())
            evaluations += 1
    return {"steps": steps, "evaluations": evaluations}


def disks_of_their_own(engine: Engine) -> dict[str, Any]:
    """A checkpoint on two nodes that see only their own files: written, found, and loaded."""
    engine.prepare(Model(), RunConfig())
    engine.is_local_main = True
    node = Path(sys.argv[1]).parent / f"node-{engine.rank}"
    writer = CheckpointWriter(
        node / DIRECTORY,
        engine.rank,
        engine.world_size,
        is_local_main=True,
        exchange=engine.exchange,
        retention=Retention(1, 0),
        companions=lambda directory: (directory / "config.json").write_text("{}") and None,
    )
    copies = HostCopies(engine.rank, engine.world_size)
    for number in (1, 2):
        step(engine, spoiled=False)
        tensors = copies.capture(engine.strategy)
        specs = tensor_specs(engine.strategy.plain_model())
        writer.submit(tensors, make_manifest(number, world_size=engine.world_size, tensors=specs))
        writer.wait()
        assert writer.problem is None, writer.problem
    own_directory = RunConfig(run=OutputConfig(output_dir=node))
    before = weights(engine)
    step(engine, spoiled=False)
    changed = weights(engine)
    checkpoint, _ = find(engine, own_directory, Resume("auto"))
    assert checkpoint is not None
    load(engine, checkpoint)
    after = weights(engine)
    kept = all(torch.equal(before[name], after[name]) for name in before)
    moved = any(not torch.equal(before[name], changed[name]) for name in before)
    files = sorted(str(path.relative_to(node)) for path in node.rglob("*") if path.is_file())
    engine.gather(None)
    if engine.rank == 1:  # a node's disk is lost
        next(node.rglob("*.safetensors")).unlink()
    try:
        find(engine, own_directory, Resume("auto"))
    except UserError as error:
        return {"kept": kept and moved, "files": files, "refusal": str(error)}
    raise AssertionError("a checkpoint without one of its shards was used")


def main() -> None:
    engine = Engine(LaunchEnvironment.read(), timeout_minutes=1)
    result = {
        "spoiled": spoiled_gradient,
        "micro_batch": limited_micro_batch,
        "sweep": sweep,
        "disks": disks_of_their_own,
    }[sys.argv[2]](engine)
    results = engine.gather(result)
    if engine.is_main:
        Path(sys.argv[1]).write_text(json.dumps(results))
    engine.close()
    sys.stdout.flush()
    os._exit(0)  # as qa_dist/__main__.py does, and says why


if __name__ == "__main__":
    main()
