"""Training throughput of our loop beside two plain ones, on two processes with DDP on the CPU.

The plain loops are what example scripts do: windows in random order, each process's share of a batch padded to
`max_length`, or to its longest window. All three train the same model on the same data from the same weights, by
turns in one run, and their validation losses are compared after the same number of examples. What is counted is
processor time, since cores may be shared.

    python -m tests.benchmarks.throughput
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from qa_dist.config import RunConfig
from qa_dist.tasks import load_task
from qa_dist.tasks.task import FeatureSet, Task
from qa_dist.training.batching import Indices, evaluation_batches, plan_epoch
from qa_dist.training.engine import Engine, parameter_groups, seed_step
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.micro_batch import micro_batch_size
from qa_dist.training.models import build_model
from qa_dist.training.preemption import StopRequest
from qa_dist.training.step import Step

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
RATE = 5e-5
TARGETS = {"padded to max_length": 2.0, "padded to the longest": 1.45}


@dataclass
class Loop:
    """One way of training, with the processor time it has taken."""

    train: Callable[[Indices], None]
    model: nn.Module
    order: Iterator[Indices]
    seconds_per_sample: list[float] = field(default_factory=list)
    """Processor time of all ranks, for each turn."""


def epochs(lengths: Any, seed: int, size: int, grouped: bool) -> Iterator[Indices]:
    """Global batches for ever; the short one at the end of an epoch is left out, so that all are the same size."""
    epoch = 0
    while True:
        epoch += 1
        plan = plan_epoch(lengths, seed=seed, epoch=epoch, global_batch_size=size, group_by_length=grouped)
        yield from (batch for batch in plan if len(batch) == size)


def ours(config: RunConfig, engine: Engine, task: Task, features: FeatureSet, seed: int) -> Loop:
    model, _ = build_model(config, task)
    size, _ = micro_batch_size(config.train, engine, task, model, features)
    engine.prepare(model, config)
    step = Step(config.train, engine, task, features, size, StopRequest())
    number = 0

    def train(batch: Indices) -> None:
        nonlocal number
        step.run(number, RATE, batch, step.collate(batch))
        number += 1

    grouped = config.train.group_by_length
    return Loop(train, engine.model, epochs(features.lengths, seed, config.train.global_batch_size, grouped))


def plain(config: RunConfig, engine: Engine, task: Task, features: FeatureSet, seed: int, to_max: bool) -> Loop:
    model, _ = build_model(config, task)
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config.train.weight_decay), lr=RATE)
    wrapped, stepped = engine.accelerator.prepare(model, optimizer)
    number = 0

    def train(batch: Indices) -> None:
        nonlocal number
        seed_step(config.train.seed, number, engine.rank)
        number += 1
        share = np.array_split(batch, engine.world_size)[engine.rank]
        collated = features.collate(share, config.data.max_length if to_max else 8)
        targets = {f"{name}_positions": collated.targets[f"{name}_position"] for name in ("start", "end")}
        output = wrapped(**collated.inputs, **targets)
        engine.accelerator.backward(output.loss)
        stepped.step()
        stepped.zero_grad()

    return Loop(train, wrapped, epochs(features.lengths, seed, config.train.global_batch_size, grouped=False))


def validation_loss(engine: Engine, model: nn.Module, task: Task, features: FeatureSet, count: int) -> float:
    """Over the first `count` windows, without dropout."""
    model.eval()
    sums = torch.zeros(2)
    batches = evaluation_batches(features.lengths[:count], 16)
    for indices in batches[engine.rank :: engine.world_size]:
        batch = features.collate(indices)
        with torch.no_grad():
            losses = task.loss(model(**batch.inputs), batch)
        sums += torch.tensor([losses.sum().item(), len(indices)])
    model.train()
    total, number = engine.sum(sums).tolist()
    return total / number


def worker(arguments: argparse.Namespace) -> None:
    """One process of the launch: trains all loops by turns; the main one prints the results as JSON."""
    config = RunConfig.model_validate(
        {
            "data": {
                "train_file": arguments.train_file,
                "validation_file": arguments.validation_file,
                "unanswerable": "allow",
            },
            "model": {"name": arguments.model},
            "train": {"global_batch_size": arguments.batch, "learning_rate": RATE},
        }
    )
    engine = Engine(LaunchEnvironment.read(), timeout_minutes=30)
    task = engine.local_main_first(lambda: load_task(config))
    train_set = engine.local_main_first(lambda: task.features("train"))
    validation_set = engine.local_main_first(lambda: task.features("validation"))
    assert train_set is not None
    assert validation_set is not None
    loops = {
        "ours": ours(config, engine, task, train_set, arguments.seed),
        "padded to max_length": plain(config, engine, task, train_set, arguments.seed, to_max=True),
        "padded to the longest": plain(config, engine, task, train_set, arguments.seed, to_max=False),
    }
    for turn in range(arguments.turns):
        for name, loop in loops.items():
            engine.gather(None)  # nobody's time is counted for another's lateness
            started = time.process_time()
            for _ in range(arguments.steps):
                loop.train(next(loop.order))
            used = torch.tensor(time.process_time() - started, dtype=torch.float64)
            loop.seconds_per_sample.append(engine.sum(used).item() / (arguments.steps * arguments.batch))
            if engine.is_main:
                print(f"turn {turn + 1}/{arguments.turns}  {name}: {1 / loop.seconds_per_sample[-1]:.2f}", flush=True)
    losses = {name: validation_loss(engine, loop.model, task, validation_set, 256) for name, loop in loops.items()}
    if engine.is_main:
        result = {name: {"loss": losses[name], "seconds": loop.seconds_per_sample} for name, loop in loops.items()}
        Path(arguments.result).write_text(json.dumps(result))
    engine.close()
    sys.stdout.flush()
    os._exit(0)  # as qa_dist/__main__.py does, and says why


def table(result: dict[str, Any], examples: int) -> str:
    """Markdown. The first turn of each loop warms up and is left out of the times."""
    rows = [
        f"| loop | samples per CPU second | ratio | in any turn | target | loss after {examples:,} examples |",
        "|---|---|---|---|---|---|",
    ]
    own = result["ours"]["seconds"][1:]
    for name, figures in result.items():
        seconds = figures["seconds"][1:]
        rate = f"{1 / statistics.median(seconds):.2f}"
        ratios = sorted(other / mine for other, mine in zip(seconds, own, strict=True))
        compared = " | | "
        if name != "ours":
            compared = f"{statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} | ≥ {TARGETS[name]}"
        rows.append(f"| {name} | {rate} | {compared} | {figures['loss']:.3f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train-file", default=str(SHARED / "data/squad_v2/train.json"))
    parser.add_argument("--validation-file", default=str(SHARED / "data/squad_v2/dev.json"))
    parser.add_argument("--model", default=str(SHARED / "models/minilm-l6"))
    parser.add_argument("--batch", type=int, default=16, help="windows per optimizer step, over both processes")
    parser.add_argument("--turns", type=int, default=6, help="how often each loop gets its turn")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result:
        worker(arguments)
    for path in (arguments.train_file, arguments.validation_file, arguments.model):
        if not Path(path).exists():
            sys.exit(f"{path}: is not there; name another file, see --help")
    with tempfile.TemporaryDirectory() as directory:
        launch, result = Path(directory) / "launch.yaml", Path(directory) / "result.json"
        config = yaml.safe_load((ROOT / "configs/accelerate/cpu_ddp.yaml").read_text())
        launch.write_text(yaml.safe_dump(config | {"main_process_port": 0}))
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(launch)]
        command += ["-m", "tests.benchmarks.throughput", *sys.argv[1:], "--result", str(result)]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        if code:
            sys.exit(code)
        print("\n" + table(json.loads(result.read_text()), arguments.turns * arguments.steps * arguments.batch))


if __name__ == "__main__":
    main()
