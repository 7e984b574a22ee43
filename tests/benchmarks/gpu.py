"""Training throughput on a GPU by precision, padding, packed attention and compilation, for BERT-base and BERT-large.

Weights come from a config and windows are random tokens with the lengths of real ones, so nothing is downloaded. Every
row trains through the same code as a run (`Engine`, `Step`).

    python -m tests.benchmarks.gpu
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_dist.config import RunConfig
from qa_dist.tasks.question_answering.task import QuestionAnswering
from qa_dist.tasks.task import Batch
from qa_dist.training.batching import plan_epoch
from qa_dist.training.engine import Engine
from qa_dist.training.health import FlopsPerWindow, peak_flops, peak_memory
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.preemption import StopRequest
from qa_dist.training.step import Step
from tests.helpers import Numbered

ROOT = Path(__file__).parents[2]
MAX_LENGTH = 384
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "base": {},  # BertConfig's own
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


class RandomWindows(Numbered):
    """Random tokens in windows of the given lengths."""

    def __init__(self, lengths: np.ndarray, pad_all: bool, vocabulary: int):
        """`pad_all`: to `MAX_LENGTH`, as example scripts do."""
        self.lengths = lengths
        self.pad_all = pad_all
        self.vocabulary = vocabulary

    def collate(self, indices, multiple: int = 8) -> Batch:
        lengths = torch.from_numpy(self.lengths[indices])
        width = MAX_LENGTH if self.pad_all else -(-int(lengths.max()) // multiple) * multiple
        mask = (torch.arange(width) < lengths[:, None]).long()
        ids = torch.randint(5, self.vocabulary, (len(indices), width)) * mask
        types = (torch.arange(width) > 12).long() * mask
        targets = {"start_position": lengths // 2, "end_position": lengths // 2 + 1}
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return Batch(inputs, targets, torch.from_numpy(np.asarray(indices, dtype=np.int64)))


def squad_lengths(count: int) -> np.ndarray:
    """Distributed roughly as SQuAD's windows: 174 tokens on average, 384 at most."""
    return np.random.RandomState(0).lognormal(5.08, 0.4, count).clip(20, MAX_LENGTH).astype(np.int64)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    precision: str
    attention: str = "auto"
    compiled: bool = False
    pad_all: bool = False
    grouped: bool = True
    full: bool = False
    """Whether all windows are `MAX_LENGTH` long."""


CASES = [
    Case("float32 (TF32), padded to 384", "no", pad_all=True, grouped=False),
    Case("float32 (TF32), grouped", "no"),
    Case("bf16, padded to 384", "bf16", pad_all=True, grouped=False),
    Case("bf16, padded to the longest", "bf16", grouped=False),
    Case("bf16, grouped", "bf16"),
    Case("bf16, grouped, compiled", "bf16", compiled=True),
    Case("bf16, varlen", "bf16", attention="varlen", grouped=False),
    Case("fp16, grouped", "fp16"),
    Case("bf16, all windows 384", "bf16", full=True),
    Case("bf16, all windows 384, compiled", "bf16", compiled=True, full=True),
    Case("bf16, all windows 384, varlen", "bf16", attention="varlen", full=True),
]


def measure(case: Case, shape: str, batch_size: int, steps: int) -> dict[str, float | None]:
    """One row, in a process of its own that was started with the case's precision."""
    config = RunConfig.model_validate(
        {"train": {"compile": case.compiled, "global_batch_size": batch_size, "warmup_ratio": 0.0}}
    )
    launch = LaunchEnvironment.read()
    launch.announce()
    engine = Engine(launch, timeout_minutes=5)
    torch.manual_seed(0)
    model_config = AutoConfig.for_model("bert", **SHAPES[shape])
    model = AutoModelForQuestionAnswering.from_config(model_config, dtype=torch.float32)
    if case.attention == "varlen" and (why_not := engine.use_packed_attention(model)) and "not used" in why_not[0]:
        raise RuntimeError(why_not[0])
    flops = FlopsPerWindow.of(model)
    engine.prepare(model, config)
    lengths = np.full(64 * batch_size, MAX_LENGTH) if case.full else squad_lengths(64 * batch_size)
    features = RandomWindows(lengths, case.pad_all, model_config.vocab_size)
    task = object.__new__(QuestionAnswering)  # the loss needs no data
    step = Step(config.train, engine, task, features, batch_size, StopRequest())
    plan = plan_epoch(lengths, seed=0, epoch=1, global_batch_size=batch_size, group_by_length=case.grouped)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warm_up = len(plan) // 2 if case.compiled else 4  # every length has to be compiled once
    rows = []
    for number in range(warm_up + steps):
        batch = plan[number % len(plan)]
        collated = step.collate(batch)
        engine.synchronize()
        started = time.perf_counter()
        step.run(number, 1e-5, batch, collated)
        engine.synchronize()
        if number >= warm_up:
            seconds = time.perf_counter() - started
            rows.append((seconds, len(batch), lengths[batch].sum(), flops(lengths[batch]) if flops else 0.0))
    seconds, samples, tokens, work = (float(sum(column)) for column in zip(*rows, strict=True))
    peak = peak_flops(engine.device, case.precision)
    return {
        "samples": samples / seconds,
        "tokens": tokens / seconds,
        "memory": peak_memory(engine.device),
        "mfu": work / seconds / peak if peak else None,
        "step": statistics.median(row[0] for row in rows) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["base", "large"])
    parser.add_argument("--batch", type=int, default=64, help="windows per step")
    parser.add_argument("--steps", type=int, default=40, help="timed steps per row")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        row = measure(CASES[arguments.case], arguments.shapes[0], arguments.batch, arguments.steps)
        print(json.dumps(row), flush=True)
        os._exit(0)
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU, so this says nothing about a GPU"
    print(f"{datetime.date.today()}; {device}; torch {torch.__version__}; {arguments.batch} windows per step.\n")
    for shape in arguments.shapes:
        print(f"### BERT-{shape}\n")
        print("| what | samples/s | tokens/s | peak memory, GiB | model FLOPs utilization | median step, ms |")
        print("|---|---|---|---|---|---|")
        for number, case in enumerate(CASES):
            if on_gpu or (case.attention != "varlen" and case.precision != "fp16"):
                print(f"| {case.name} | {row_of(number, shape, arguments)} |", flush=True)
            else:
                print(f"| {case.name} | needs a GPU | | | | |")
        print()


def row_of(number: int, shape: str, arguments: argparse.Namespace) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--case", str(number), "--shapes", shape]
    command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps)]
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": CASES[number].precision}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if finished.returncode:
        why = "out of memory" if "OutOfMemoryError" in finished.stderr else finished.stderr.strip().split("\n")[-1]
        return f"{why} | | | | "
    found = json.loads(finished.stdout.strip().split("\n")[-1])
    mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
    return f"{found['samples']:.1f} | {found['tokens']:,.0f} | {found['memory']:.1f} | {mfu} | {found['step']:.1f}"


if __name__ == "__main__":
    main()
