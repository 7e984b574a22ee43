"""What Accelerate's launcher has put into the environment, read before any process group exists."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from qa_dist.config import RunConfig
from qa_dist.config_sources import Problem
from qa_dist.installed import NO_DEEPSPEED, has_deepspeed
from qa_dist.launch_directory import EXPECTED_WORLD


@dataclass(frozen=True)
class LaunchEnvironment:
    """How this process was started. Without a launcher: alone, on whatever device there is."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    """Processes on this node."""
    use_deepspeed: bool
    use_fsdp: bool
    offloads: bool
    """Whether DeepSpeed keeps weights or optimizer states in host memory."""
    mixed_precision: str
    """no, fp16 or bf16."""
    is_split: bool
    """Whether more processes were asked for than this one, which has not been told of any."""
    cpu_asked_for: bool
    """Whether the launch config said so, where it is known to."""
    planned_world: int | None
    """Processes that `qa-dist launch` has planned, on all machines together."""
    on_cpu: bool
    """Whether the run is to use the CPU: because it was asked for, or because there is nothing else."""

    @classmethod
    def read(cls) -> "LaunchEnvironment":
        get = os.environ.get
        cpu_asked_for = get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") or get("DS_ACCELERATOR") == "cpu"
        offloads = (get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM"))
        return cls(
            rank=int(get("RANK", "0")),
            local_rank=int(get("LOCAL_RANK", "0")),
            world_size=int(get("WORLD_SIZE", "1")),
            local_world_size=int(get("LOCAL_WORLD_SIZE", get("WORLD_SIZE", "1"))),
            offloads=any(device not in ("none", "None", "") for device in offloads),
            cpu_asked_for=cpu_asked_for,
            use_deepspeed=get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true",
            use_fsdp=get("ACCELERATE_USE_FSDP", "false").lower() == "true",
            # Accelerate's launcher for a single process sets the master's address only if more were asked for.
            is_split="ACCELERATE_MIXED_PRECISION" in os.environ
            and "MASTER_ADDR" in os.environ
            and "WORLD_SIZE" not in os.environ,
            mixed_precision=get("ACCELERATE_MIXED_PRECISION", "no").lower(),
            planned_world=int(get(EXPECTED_WORLD, "0")) or None,
            on_cpu=cpu_asked_for or not torch.accelerator.is_available(),
        )

    def announce(self) -> None:
        """Tell DeepSpeed about the device. It reads this when it is first imported, by whichever library."""
        if self.on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def problems(self, config: RunConfig) -> list[Problem]:
        """What about the launch does not fit this machine."""
        problems = []
        if self.is_split:
            problems.append(
                Problem(
                    (),
                    "more processes were asked for, but this one was started alone, as Accelerate does for MULTI_CPU "
                    "and for --cpu. On a CPU use distributed_type MULTI_GPU with use_cpu, or DEEPSPEED (see "
                    "configs/accelerate)",
                )
            )
        if self.planned_world not in (None, self.world_size):
            message = (
                f"{self.planned_world} processes were to be started, and this is one of {self.world_size}: have all "
                "machines been given the same --num_machines and --num_processes, and have all the same number of GPUs?"
            )
            problems.append(Problem((), message))
        if self.use_deepspeed and os.environ.get("CROSS_SIZE") == "1":
            # Accelerate hands over to DeepSpeed's own launcher only for several machines. Without a hostfile that one
            # knows of none but its own, and starts a world of its own there.
            message = (
                "several machines were asked for, but DeepSpeed's launcher has started processes on this one alone; "
                "add --deepspeed_multinode_launcher standard behind `accelerate launch`, on each machine"
            )
            problems.append(Problem((), message))
        devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        # Without any GPU nobody can tell: Accelerate does not pass on that use_cpu was set.
        if devices and self.local_world_size > devices and not self.cpu_asked_for:
            message = (
                f"num_processes: the launch config asks for {self.local_world_size} GPUs on this machine, which has "
                f"{devices}; set num_processes to {devices}"
            )
            problems.append(Problem((), message))
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            message = (
                f"mixed_precision: {self.mixed_precision} (from the launch config) is not supported; set it to bf16"
            )
            problems.append(Problem((), message))
        if self.use_deepspeed and not has_deepspeed():
            problems.append(Problem((), NO_DEEPSPEED))
        problems += _deepspeed_file_problems(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
        if self.mixed_precision == "fp16" and self.on_cpu:
            problems.append(
                Problem(
                    (),
                    "mixed_precision: fp16 (from the launch config) does not exist on a CPU; set it to bf16 or no",
                )
            )
        if config.model.attention == "varlen" and self.on_cpu:
            message = "model.attention: varlen needs an NVIDIA GPU, and this run is on the CPU; set it to auto"
            problems.append(Problem(("model.attention",), message))
        return problems

    def training_problems(self, config: RunConfig) -> list[Problem]:
        """What about the launch does not fit the training settings."""
        problems = []
        if self.use_fsdp and self.mixed_precision == "fp16":
            message = "mixed_precision: fp16 (from the launch config) is not supported under FSDP; use bf16"
            problems.append(Problem((), message))
        if self.use_fsdp and os.environ.get("FSDP_VERSION", "2") != "2":
            message = "fsdp_version: FSDP1 (from the launch config) is not supported; set it to 2"
            problems.append(Problem((), message))
        if self.use_fsdp and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
            message = (
                "fsdp_offload_params (in the launch config) is not supported; use configs/accelerate/zero3_offload"
            )
            problems.append(Problem((), message))
        zero_3 = self.use_deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
        if config.train.compile and (zero_3 or self.use_fsdp):
            message = "train.compile: is not supported for a sharded model; use DDP, ZeRO-1 or ZeRO-2"
            problems.append(Problem(("train.compile",), message))
        if config.train.tokens_per_batch is not None or config.train.global_batch_size >= self.world_size:
            return problems
        message = (
            f"train.global_batch_size: {config.train.global_batch_size} is less than one window for each of the "
            f"{self.world_size} processes; raise it, or start fewer processes"
        )
        return [*problems, Problem(("train.global_batch_size",), message)]


OURS = {
    "train_batch_size": "train.global_batch_size says it",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size says it",
    "gradient_accumulation_steps": "it follows from train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm says it",
    "optimizer": "the settings under train say it",
    "scheduler": "the settings under train say it",
}
"""What a DeepSpeed config file may say, but a run's settings decide: the same under every engine."""


def _deepspeed_file_problems(path: str | None) -> list[Problem]:
    """What does not belong into the DeepSpeed config file that the launch config names."""
    if not path or path.lower() == "none":
        return []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [Problem((), f"deepspeed_config_file: {path} (from the launch config) cannot be read: {error}")]
    found = [key for key in OURS if isinstance(content, dict) and content.get(key, "auto") != "auto"]
    return [
        Problem((), f'{key}: {content[key]!r} (in {path}) would be ignored: {OURS[key]}; take it out, or write "auto"')
        for key in found
    ]
