"""What this machine and this launch are, what is wrong with them, and what a model would need."""

import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qa_dist.config import RunConfig
from qa_dist.errors import UserError
from qa_dist.installed import has_deepspeed
from qa_dist.reporting.environment import host_memory, software
from qa_dist.training.engine import Engine
from qa_dist.training.health import peak_flops
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.micro_batch import HEADROOM

LITTLE_DISK = 2 * 2**30
ALL_REDUCE_BYTES = 64 * 2**20


def examine(config: RunConfig, launch: LaunchEnvironment) -> int:
    """Print the findings on the main process. Returns the exit code: 2 where something has to be mended.

    Raises `UserError` for a model that cannot be found.
    """
    problems = [problem.message for problem in launch.problems(config)]
    facts: list[tuple[str, str]] = [*_machine(), *_disks(config, problems), ("Hub", _hub())]
    engine = None
    if not launch.problems(config):  # what is wrong with one node's disk must not keep the others waiting
        engine = Engine(launch, config.run.timeout_minutes)
        facts = [("engine", engine.description), *facts, ("all-reduce", _all_reduce(engine))]
    facts.append(("DeepSpeed ops", _deepspeed_ops(launch, problems)))
    memory = _memory(config, launch) if config.model.name else None
    if launch.is_main or (problems and launch.local_rank == 0):
        _print(facts, problems, memory)
    if engine is not None:
        engine.close()
    return 2 if problems else 0


def _print(facts: list[tuple[str, str]], problems: list[str], memory: "Table | None") -> None:
    console = Console(soft_wrap=True, highlight=False)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(f"{name:<{width}}  {value}", markup=False)
    if memory is not None:
        console.print(memory)
    for problem in problems:
        console.print(f"problem: {problem}", markup=False)
    console.print("nothing is wrong" if not problems else f"{len(problems)} to mend", markup=False)


# ------------------------------------------------------------------------------------------------ the machine


def _machine() -> Iterator[tuple[str, str]]:
    yield "machine", f"{platform.node()}, {os.cpu_count()} cores, {host_memory() / 2**30:.0f} GiB, {platform.system()}"
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "packages", ", ".join(f"{name} {version}" for name, version in software().items() if name != "Python")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU"
        yield "GPUs", f"none ({built})"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info(i))
        bf16 = "bf16" if properties.major >= 8 else "no bf16: use fp16"
        known = "" if peak_flops(torch.device("cuda", i), "bf16") else ", peak FLOP/s not known"
        yield f"GPU {i}", f"{properties.name}, {free:.0f} of {total:.0f} GiB free, {bf16}{known}"
    threads = os.environ.get("OMP_NUM_THREADS")
    yield "threads", f"OMP_NUM_THREADS {threads or 'not set'}, {torch.get_num_threads()} for torch"


def _disks(config: RunConfig, problems: list[str]) -> Iterator[tuple[str, str]]:
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {
        "run.output_dir": config.output_dir,
        "data.cache_dir": config.data.cache_dir or Path(HF_DATASETS_CACHE),
        "Hub cache": Path(HF_HUB_CACHE),
    }
    for name, path in places.items():
        existing = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())
        free = shutil.disk_usage(existing).free
        yield name, f"{path}, {free / 2**30:.1f} GiB free"
        if not os.access(existing, os.W_OK):
            problems.append(f"{name}: {existing} cannot be written; name another directory")
        elif free < LITTLE_DISK:
            problems.append(f"{name}: {free / 2**30:.1f} GiB free on the disk of {existing}; free some, or use another")


def _hub() -> str:
    import huggingface_hub
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    token = "a token is set" if huggingface_hub.get_token() else "no token (HF_TOKEN, or `hf auth login`)"
    return f"{ENDPOINT}, {'offline, ' if HF_HUB_OFFLINE else ''}{token}"


def _all_reduce(engine: Engine) -> str:
    """The median time of a sum over all ranks, and the bandwidth of the ring algorithm that it amounts to."""
    if engine.world_size == 1:
        return "not timed: one process"
    values = torch.ones(ALL_REDUCE_BYTES // 4, device=engine.device)
    seconds = []
    for _ in range(6):
        engine.synchronize()
        started = time.perf_counter()
        engine.sum(values)
        engine.synchronize()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[1:])  # the first one sets up connections
    moved = ALL_REDUCE_BYTES * 2 * (engine.world_size - 1) / engine.world_size
    return f"{ALL_REDUCE_BYTES >> 20} MiB in {median * 1e3:.1f} ms ({moved / median / 1e9:.2f} GB/s per rank)"


def _deepspeed_ops(launch: LaunchEnvironment, problems: list[str]) -> str:
    if not has_deepspeed():
        return "DeepSpeed is not installed"
    tools = {name: shutil.which(name) is not None for name in ("g++", "ninja")}
    missing = [name for name, found in tools.items() if not found]
    if not missing:
        return "can be compiled here (g++, ninja)"
    text = f"cannot be compiled: no {' and no '.join(missing)}"
    if launch.use_deepspeed and launch.offloads:
        problems.append(
            f"DeepSpeed's offloading compiles an optimizer, and this machine has no {', no '.join(missing)}"
        )
    return text


# --------------------------------------------------------------------------------------------------- a model


@dataclass(frozen=True)
class Need:
    """What an engine keeps on one device."""

    engine: str
    states: float
    """Bytes of weights, gradients and optimizer states."""


def needs(parameters: int, largest_layer: int, processes: int, *, has_deepspeed: bool = True) -> list[Need]:
    """Return the engines that are installed, fastest first, with what each keeps on a device.

    DDP keeps 16 bytes per weight and its buckets 4; FSDP2 shards the 16 and holds a gathered layer; ZeRO-1 keeps the
    16-bit weights and gradients and its part of the rest (Rajbhandari et al. 2020, section 3.1). Stages 2 and 3 are as
    DeepSpeed estimates them (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_model_states_mem_needs`).
    """
    ddp = Need("ddp", (16 + (4 if processes > 1 else 0)) * parameters)
    if not has_deepspeed:
        return [ddp, Need("fsdp2", 4 * largest_layer + 16 * parameters / processes)]
    return [
        ddp,
        Need("zero1", (2 + 4 + 12 / processes) * parameters),
        Need("zero2", 2 * parameters + 18 * parameters / processes),
        Need("zero3", 4 * largest_layer + 18 * parameters / processes),
        Need("zero3_offload", 4 * largest_layer),
    ]


def activations_per_window(layers: int, hidden: int, length: int, bytes_per_value: int) -> float:
    """Bytes that the backward pass needs of one window: 34 x length x hidden for each layer in 16 bits, as Korthikanti
    et al. 2022 (section 4.1) count, without the attention scores, which fused attention does not keep."""
    return 34 * length * hidden * layers * bytes_per_value / 2


@dataclass(frozen=True)
class Estimate:
    """What a model takes on devices of one size, under every engine."""

    parameters: int
    devices: int
    memory: float
    """Bytes of each device."""
    window: float
    """Bytes that training takes for one window."""
    fits: list[tuple[Need, int]]
    """Engines, fastest first, and how many windows fit beside what they keep."""

    @property
    def best(self) -> tuple[str, int] | None:
        """The fastest engine that leaves room for a window, and for how many; None where none does."""
        return next(((need.engine, windows) for need, windows in self.fits if windows >= 1), None)


def estimate(config: RunConfig, devices: int, bytes_per_value: int) -> Estimate:
    """For `config.model.name` on `devices` of the kind that this machine has. Raises `UserError` without such a
    model."""
    model = _empty_model(config)
    shape: Any = model.config
    parameters = sum(p.numel() for p in model.parameters())
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    on_gpu = torch.cuda.is_available()
    total = torch.cuda.get_device_properties(0).total_memory if on_gpu else host_memory() / max(devices, 1)
    window = activations_per_window(shape.num_hidden_layers, shape.hidden_size, config.data.max_length, bytes_per_value)
    fits = [
        (need, max(int((HEADROOM * total - need.states) // window), 0))
        for need in needs(parameters, largest, devices, has_deepspeed=has_deepspeed())
    ]
    return Estimate(parameters, devices, total, window, fits)


def fitting_engine(config: RunConfig, devices: int) -> str:
    """The launch config in configs/accelerate for `config` on GPUs: the fastest one under which the model fits. Raises
    `UserError` for a model that cannot be looked at."""
    if config.model.name is None:
        return "ddp"
    found = estimate(config, devices, 2)
    return found.best[0] if found.best else found.fits[-1][0].engine  # the one that keeps least on a device


def _memory(config: RunConfig, launch: LaunchEnvironment) -> "Table":
    on_gpu = torch.cuda.is_available()
    devices = torch.cuda.device_count() if on_gpu and launch.world_size == 1 else launch.world_size
    found = estimate(config, devices, 4 if launch.mixed_precision == "no" else 2)
    title = (
        f"{config.model.name}: {found.parameters / 1e6:.1f} M parameters on {devices} x "
        f"{found.memory / 2**30:.0f} GiB; windows of {config.data.max_length} tokens take "
        f"{found.window / 2**20:.0f} MiB each"
    )
    table = Table("engine", "weights, gradients, optimizer", "windows that fit beside it", title=title)
    for need, fit in found.fits:
        table.add_row(need.engine, f"{need.states / 2**30:.2f} GiB", f"{fit:,}")
    if found.best is None:
        table.caption = "no engine fits: use more or larger GPUs, shorter windows, or a smaller model"
    else:
        engine, windows = found.best
        micro = 2 ** min(windows.bit_length() - 1, 7)
        name = engine if on_gpu else "cpu_zero2" if engine.startswith("zero") else "cpu_ddp"
        size = f"--train.micro_batch_size {micro} or less"
        table.caption = f"recommended: configs/accelerate/{name}.yaml, {size}; these are estimates"
    return table


def _empty_model(config: RunConfig) -> nn.Module:
    """The model without memory for its weights."""
    from qa_dist.tasks import task_class
    from qa_dist.tasks.model_config import pretrained_config

    model_config = pretrained_config(config.model)
    try:
        with torch.device("meta"):
            return task_class(config.task).auto_model.from_config(model_config)
    except ValueError as error:
        raise UserError(
            f"model.name: no {config.task.replace('_', ' ')} model can be built from it: {str(error).splitlines()[0]}"
        ) from None
