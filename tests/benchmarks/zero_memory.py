"""What each process keeps of a model under every engine: ZeRO's point, measured (Rajbhandari et al. 2020).

python -m tests.benchmarks.zero_memory
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_dist.config import RunConfig
from qa_dist.training.engine import Engine
from qa_dist.training.launch_environment import LaunchEnvironment
from tests.benchmarks.checkpoint import SHAPE
from tests.helpers import Launcher

ENGINES = {"ddp": "DDP", "zero0": "ZeRO-0", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
RANKS = (1, 2, 4)


def held(tensor: torch.Tensor) -> int:
    """Bytes of the tensor on this process, its own shard where it is divided."""
    local: Any = tensor
    local = local.to_local() if hasattr(local, "to_local") else getattr(local, "ds_tensor", local)
    return local.numel() * local.element_size()


def worker(target: str) -> None:
    engine = Engine(LaunchEnvironment.read(), timeout_minutes=5)
    shape: Any = SHAPE
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model(**shape))
    total = sum(parameter.numel() for parameter in model.parameters())
    engine.prepare(model, RunConfig())
    ids = torch.ones(1, 16, dtype=torch.long)
    with engine.strategy.accumulating(last=True):
        output = engine.model(input_ids=ids, attention_mask=ids)
        engine.strategy.backward(output.start_logits.float().sum() + output.end_logits.float().sum())
    engine.strategy.update()
    optimizer: Any = engine.strategy.optimizer
    while hasattr(optimizer, "optimizer"):  # Accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    states = sum(
        held(value) for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )
    weights = sum(held(parameter) for parameter in engine.strategy.plain_model().parameters())
    figures = engine.gather({"states": states / total, "weights": weights / total})
    if engine.is_main:
        Path(target).write_text(json.dumps(figures))
    engine.close()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    if len(sys.argv) > 1:
        worker(sys.argv[1])
    print("| engine | " + " | ".join(f"moments, {n} ranks | weights, {n} ranks" for n in RANKS) + " |")
    print("|---" * (1 + 2 * len(RANKS)) + "|")
    for engine, name in ENGINES.items():
        cells = []
        for ranks in RANKS:
            with tempfile.TemporaryDirectory() as directory:
                result = Path(directory) / "result.json"
                launch = Launcher(Path(directory)).run(engine, ranks, "-m", "tests.benchmarks.zero_memory", str(result))
                if launch.code:
                    sys.exit(launch.output)
                figures = json.loads(result.read_text())
                cells += [f"{max(rank[what] for rank in figures):.2f}" for what in ("states", "weights")]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
