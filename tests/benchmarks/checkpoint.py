"""How long the training thread waits for a checkpoint, beside Accelerate's `save_state` and a plain copy to the host.

All three save the same state of the same model by turns in one run. What is written is compared with the size of
weights and two moments in float32.

    python -m tests.benchmarks.checkpoint
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_dist.checkpoint.state import MOMENTS, HostCopies, non_finite
from qa_dist.checkpoint.store import directory_name
from qa_dist.checkpoint.writer import CheckpointWriter, Retention
from qa_dist.config import RunConfig
from qa_dist.training.engine import Engine
from qa_dist.training.launch_environment import LaunchEnvironment
from tests.helpers import Launcher, make_manifest

SETUPS = [("ddp", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)]
SHAPE = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
ROUNDS = 7


def worker(target: Path) -> None:
    launch = LaunchEnvironment.read()
    launch.announce()
    engine = Engine(launch, timeout_minutes=5)
    shape: Any = SHAPE
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model(**shape))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine.prepare(model, RunConfig())
    ids = torch.ones(1, 16, dtype=torch.long)
    with engine.strategy.accumulating(last=True):
        output = engine.model(input_ids=ids, attention_mask=ids)
        engine.strategy.backward(output.start_logits.sum() + output.end_logits.sum())
    engine.strategy.update()

    root = target.parent / "checkpoints"
    copies = HostCopies(engine.rank, engine.world_size)
    writer = CheckpointWriter(
        root,
        engine.rank,
        engine.world_size,
        is_local_main=engine.is_local_main,
        exchange=engine.exchange,
        retention=Retention(1, 0),
    )
    times: dict[str, list[float]] = {"ours": [], "save_state": [], "copy": [], "check": []}
    host = {}
    for number in range(ROUNDS):
        engine.gather(None)
        started = time.perf_counter()
        tensors = copies.capture(engine.strategy)
        manifest = make_manifest(number, world_size=engine.world_size)
        writer.submit(tensors, manifest)
        times["ours"].append(time.perf_counter() - started)
        writer.wait()
        assert writer.problem is None, writer.problem

        # the bytes of this rank's share, from one place in memory to another
        engine.gather(None)
        started = time.perf_counter()
        for name, tensor in tensors.items():
            host.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
        times["copy"].append(time.perf_counter() - started)

        engine.gather(None)
        started = time.perf_counter()
        assert non_finite(tensors) == []  # as the writing thread does before it writes
        times["check"].append(time.perf_counter() - started)

        engine.gather(None)
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            engine.accelerator.save_state(str(target.parent / "save_state"))
        times["save_state"].append(time.perf_counter() - started)
        engine.gather(None)
        if engine.is_main:
            shutil.rmtree(target.parent / "save_state", ignore_errors=True)
    files = (root / directory_name(ROUNDS - 1)).glob("*.safetensors")
    size = sum(path.stat().st_size for path in files) / ((1 + len(MOMENTS)) * 4 * parameters)
    slowest = {name: [max(values) for values in zip(*engine.gather(own), strict=True)] for name, own in times.items()}
    if engine.is_main:
        target.write_text(json.dumps({"times": slowest, "size": size}))
    engine.close()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", nargs="?", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result:
        worker(Path(arguments.result))
    print("| engine, processes | ours / save_state | ours / copy | check / copy | bytes / (12 x weights) |")
    print("|---|---|---|---|---|")
    for engine, processes in SETUPS:
        with tempfile.TemporaryDirectory() as directory:
            result = Path(directory) / "result.json"
            launcher = Launcher(Path(directory))
            launch = launcher.run(engine, processes, "-m", "tests.benchmarks.checkpoint", str(result), timeout=500)
            if launch.code:
                sys.exit(launch.output)
            found = json.loads(result.read_text())
            times = {name: values[1:] for name, values in found["times"].items()}  # the first one makes the buffers

            def ratio(one: str, other: str, times: dict[str, list[float]] = times) -> str:
                ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
                return f"{statistics.median(ratios):.3f}"

            figures = [
                ratio("ours", "save_state"),
                ratio("ours", "copy"),
                ratio("check", "copy"),
                f"{found['size']:.4f}",
            ]
            print(f"| {engine}, {processes} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
