"""What several tests need: tiny models made on the spot, and real launches."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qa_dist.checkpoint.manifest import Launch as LaunchRecord
from qa_dist.checkpoint.manifest import Manifest, Optimizer
from qa_dist.checkpoint.progress import Progress
from qa_dist.tasks.question_answering.data import Example, Examples
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures, build_features
from qa_dist.tasks.task import FeatureSet
from tests.fork_server import ForkServer

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
"""Real data and a real model, where they are there."""

FORK_SERVER = ForkServer()

TINY_BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
}
"""Of the models that tests of several families make."""

DISTIL_SIZES = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 130}
"""The same in DistilBERT's words."""


class Numbered(FeatureSet):
    """Features without examples behind them: a name is the feature's number."""

    fingerprint = ""

    @property
    def notes(self) -> list[str]:
        return []

    def digest(self) -> str:
        return ""

    def summary(self) -> dict[str, str]:
        return {}

    def names(self, indices: Any) -> list[str]:
        return [str(i) for i in indices]


@dataclass
class Launch:
    """A finished launch."""

    code: int
    output: str


class Launcher:
    """`accelerate launch` with a launch config written on the spot."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._started: list[subprocess.Popen[str]] = []

    def close(self) -> None:
        """Kill what a test that has failed left running."""
        for process in self._started:
            kill_group(process)

    def config(self, engine: str, processes: int, **more: Any) -> Path:
        """`engine`: ddp, fsdp2, zero0, zero1, zero2, zero3 or zero3_offload, all on CPU."""
        config: dict[str, Any] = {
            "compute_environment": "LOCAL_MACHINE",
            "mixed_precision": "no",
            "num_machines": 1,
            "machine_rank": 0,
            "main_process_port": 0,
            "num_processes": processes,
            "use_cpu": True,
        }
        if engine == "ddp":
            config["distributed_type"] = "MULTI_GPU" if processes > 1 else "NO"
        elif engine == "fsdp2":
            config["distributed_type"] = "FSDP"
            config["fsdp_config"] = {"fsdp_version": 2, "fsdp_reshard_after_forward": True}
        else:
            config["distributed_type"] = "DEEPSPEED"
            config["deepspeed_config"] = {
                "zero_stage": int(engine[4]),
                "offload_optimizer_device": "cpu" if engine.endswith("offload") else "none",
                "offload_param_device": "cpu" if engine.endswith("offload") else "none",
                "zero3_init_flag": False,
            }
        config |= more
        path = self.directory / f"launch-{engine}-{processes}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def command(
        self, engine: str, processes: int, *program: str, python: str = sys.executable, **more: Any
    ) -> list[str]:
        config = self.config(engine, processes, **more)
        return [
            *(python, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--config_file", str(config), *program),
        ]

    def run(self, engine: str, processes: int, *program: str, timeout: int = 120, **more: Any) -> Launch:
        """Wait for the end of a launch. On CPUs launcher and ranks are forks of a process with all imports done.

        `program`: a script and its arguments, or -m and a module."""
        forked = more.get("use_cpu", True)
        python = FORK_SERVER.python if forked else sys.executable
        command = self.command(engine, processes, *program, python=python, **more)
        process = self.start(command, forked_ranks=forked)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_group(process)
            output, _ = process.communicate()
            raise AssertionError(f"no end after {timeout} s:\n{output}") from None
        return Launch(process.returncode, output)

    def start(
        self, command: Sequence[str], directory: Path = ROOT, *, forked_ranks: bool = False
    ) -> subprocess.Popen[str]:
        """In a process group of its own, so that the launcher and all ranks can be ended together."""
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment(forked_ranks=forked_ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def train(self, engine: str, processes: int, output_dir: Path, *flags: str, **more: Any) -> Launch:
        return self.run(
            engine, processes, "-m", "qa_dist", "train", "--run.output_dir", str(output_dir), *flags, **more
        )


def make_manifest(step: int, *, world_size: int = 1, **fields: Any) -> Manifest:
    """A manifest of a checkpoint in the first epoch."""
    given: dict[str, Any] = {"tensors": {}, "files": {}} | fields
    return Manifest(
        step=step,
        epoch=1,
        launch=LaunchRecord(strategy="DDP", precision="float32", world_size=world_size, device="cpu"),
        optimizer=Optimizer(fused=False),
        config={},
        data="",
        score=None,
        progress=Progress(step=step, updates=step, batches_done=step),
        **given,
    )


def sealed(values: dict[str, Any]) -> bytes:
    """A manifest's file with these fields and the right digest, as anybody can make it who may write it."""
    text = json.dumps(values | {"digest": ""})
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace('"digest": ""', f'"digest": "{digest}"').encode()


def kill_group(process: "subprocess.Popen[str]") -> None:
    """Kill a process that was started in a session of its own, and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(*, forked_ranks: bool = True) -> dict[str, str]:
    """Return the environment of a command that may start ranks: by default as forks of a process with all imports done.

    `PYTHON_EXEC` is what torchrun starts in place of `python`. Tests that signal, kill or limit single ranks take real
    ones.
    """
    own = {"PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    return os.environ | own | ({"PYTHON_EXEC": FORK_SERVER.python} if forked_ranks else {})


def tiny_flags(**changes: str) -> list[str]:
    """Flags of a run that takes seconds."""
    flags = {
        "data.synthetic.train_examples": "45",
        "data.synthetic.validation_examples": "13",
        "data.synthetic.long_share": "0.3",
        "data.max_length": "96",
        "data.stride": "24",
        "model.config": json.dumps(TINY_BERT),
        "model.vocab_size": "600",
        "train.epochs": "2",
        "train.global_batch_size": "8",
        "train.learning_rate": "1e-3",
        "evaluation.batch_size": "4",
        "run.log_every": "1",
    } | changes
    return [part for key, value in flags.items() if value for part in (f"--{key}", value)]


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def squad(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Flat examples in SQuAD's nested form."""
    paragraphs = [{"context": e["context"], "qas": [{k: v for k, v in e.items() if k != "context"}]} for e in examples]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


def features_of(
    examples: Sequence[Example], tokenizer: Any, padding_side: str = "right", *, max_length: int = 120, stride: int = 30
) -> QuestionAnsweringFeatures:
    """The windows of `examples`, without a cache."""
    table = build_features(examples, tokenizer, max_length=max_length, stride=stride).combine_chunks()
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return QuestionAnsweringFeatures(table, "key", padding, lambda: Examples(list(examples)), padding_side)
