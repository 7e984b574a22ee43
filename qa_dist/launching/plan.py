"""Which processes are to be started on a machine, and the command line that does it."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qa_dist.errors import TrainingError, UserError
from qa_dist.installed import NO_DEEPSPEED, has_deepspeed, shipped_configs
from qa_dist.launch_directory import EXPECTED_WORLD
from qa_dist.launching.probe import Probe

CONFIGS = shipped_configs() / "accelerate"
"""The launch configs that come with the project."""

OPTIONS = {
    "config_file": "Accelerate launch config, or the name of one in configs/accelerate; auto (default): the first "
    "engine under which the model fits.",
    "num_machines": "Machines; default: those of the SLURM job step, or 1.",
    "machine_rank": "Number of this machine, from 0; default: its number in the SLURM job step.",
    "num_processes": "Processes on all machines together; default: one for each GPU, else what the launch config says.",
    "main_process_ip": "Host or address of machine 0; default: $MASTER_ADDR, or the SLURM job's first node.",
    "main_process_port": "A port that is free there, the same for all; default: $MASTER_PORT, or from the job's id.",
    "mixed_precision": "bf16, fp16 or no; default: what the launch config says (fp16 on GPUs without bf16).",
}

FIRST_PORT, PORTS = 20000, 10000
"""Ports for rendezvous, below those that systems hand out by themselves (Linux: from 32768)."""


@dataclass(frozen=True)
class Options:
    """What the user said; None where nothing."""

    config_file: str | None = None
    num_machines: int | None = None
    machine_rank: int | None = None
    num_processes: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None
    mixed_precision: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Machines:
    """Where a launch takes place."""

    count: int = 1
    rank: int = 0
    """Of this one."""
    main_ip: str = ""
    main_port: int = 0
    """0: any free one, which a single machine can choose by itself."""


@dataclass(frozen=True)
class Plan:
    """What `accelerate launch` is told."""

    config_file: Path
    is_deepspeed: bool
    machines: Machines
    num_processes: int
    """On all machines together."""
    mixed_precision: str | None
    program: tuple[str, ...]
    """Arguments of qa-dist."""

    @property
    def processes_here(self) -> int:
        return self.num_processes // self.machines.count

    def arguments(self, rank: int | None = None) -> list[str]:
        """What follows `accelerate launch`, on machine `rank` or this one."""
        machines = self.machines
        arguments = ["--config_file", str(self.config_file), "--num_processes", str(self.num_processes)]
        arguments += ["--num_machines", str(machines.count)]
        arguments += ["--machine_rank", str(machines.rank if rank is None else rank)]
        if machines.count > 1:
            arguments += ["--main_process_ip", machines.main_ip, "--rdzv_backend", "static"]
            if self.is_deepspeed:
                arguments += ["--deepspeed_multinode_launcher", "standard"]
        arguments += ["--main_process_port", str(machines.main_port)]
        if self.mixed_precision:
            arguments += ["--mixed_precision", self.mixed_precision]
        return [*arguments, "-m", "qa_dist", *self.program]

    def environment(self, before: Mapping[str, str], cores: int) -> dict[str, str]:
        """What is set for the processes, unless it is `before`."""
        wanted = {
            "OMP_NUM_THREADS": str(max(cores // max(self.processes_here, 1), 1)),
            "PYTHONUNBUFFERED": "1",
        }
        built = Path(sys.prefix) / "torch_extensions"
        if built.is_dir():
            wanted["TORCH_EXTENSIONS_DIR"] = str(built)
        return {key: value for key, value in wanted.items() if key not in before} | {
            EXPECTED_WORLD: str(self.num_processes)
        }

    def lines(self, before: Mapping[str, str], cores: int) -> list[str]:
        """The command line of each machine, for people and shells."""
        shown = {key: value for key, value in self.environment(before, cores).items() if key != EXPECTED_WORLD}
        settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in shown.items())
        prefix = f"{settings} accelerate launch"
        return [f"{prefix} {shlex.join(self.arguments(rank))}" for rank in range(self.machines.count)]


def plan(options: Options, program: Sequence[str], environ: Mapping[str, str], look: Callable[[int], Probe]) -> Plan:
    """`look` finds out what GPUs each of so many machines has; it is asked where that matters. Raises `UserError`."""
    machines = _machines(options, environ)
    is_named = options.config_file not in (None, "auto")
    path = launch_config(options.config_file) if is_named else None
    found = Probe() if path is not None and read_launch_config(path).get("use_cpu") else look(machines.count)
    given = environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_STEP_GPUS")
    if path is None and not found.devices and given:
        raise TrainingError(
            f"SLURM has given this node {given} GPUs, and PyTorch finds none (see nvidia-smi and `qa-dist doctor`). To "
            "train on the CPU name a launch config: cpu_ddp, cpu_zero2"
        )
    path = path or launch_config(found.engine)
    content = read_launch_config(path)
    use_cpu = bool(content.get("use_cpu"))
    count = options.num_processes
    if count is None and found.devices:
        count = found.devices * machines.count
    if count is None and not is_named:
        count = machines.count  # without a GPU one process takes all cores of its machine
    if count is None and not use_cpu:
        raise UserError(
            f"--config_file: {path.name} is for GPUs, and none is found here; name one for CPUs (cpu_ddp, cpu_zero2), "
            "or set --num_processes to start it all the same"
        )
    if count is None:
        count = int(content.get("num_processes") or machines.count)
    if count < machines.count or count % machines.count:
        raise UserError(
            f"--num_processes: {count} processes cannot be divided evenly among {machines.count} machines; it counts "
            "those of all machines together"
        )
    precision = options.mixed_precision
    if precision is None and found.no_bf16 and content.get("mixed_precision") == "bf16":
        precision = "fp16"
    deepspeed = str(content.get("distributed_type", "")).upper() == "DEEPSPEED"
    if deepspeed and not has_deepspeed():
        raise UserError(f"--config_file: {path.name}: {NO_DEEPSPEED}")
    return Plan(path, deepspeed, machines, count, precision, tuple(program))


def launch_config(name: str | None) -> Path:
    """The file that `name` is, or is short for. Raises `UserError`."""
    path = Path(name or "")
    found = path if path.suffix in (".yaml", ".yml", ".json") or path.is_file() else CONFIGS / f"{name}.yaml"
    if not found.is_file():
        known = ", ".join(sorted(one.stem for one in CONFIGS.glob("*.yaml")))
        raise UserError(f"--config_file: {name}: there is no such launch config; name a file, or one of: {known}")
    return found


def read_launch_config(path: Path) -> dict[str, Any]:
    """Its content. Raises `UserError` for one that is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config_file: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise UserError(f"--config_file: {path} is not a launch config of Accelerate (it has no distributed_type)")
    return content


def _machines(options: Options, environ: Mapping[str, str]) -> Machines:
    """As the options say, else as the SLURM job step that this process is a task of, else this machine alone."""
    in_step = "SLURM_STEP_ID" in environ and "SLURM_NODEID" in environ and "SLURM_STEP_NUM_NODES" in environ
    of_slurm = in_step and options.num_machines is None
    count = _number(environ, "SLURM_STEP_NUM_NODES") if of_slurm else options.num_machines or 1
    if of_slurm and count > 1 and _number(environ, "SLURM_STEP_NUM_TASKS") not in (0, count):
        raise UserError(
            f"srun has started {environ['SLURM_STEP_NUM_TASKS']} tasks on {count} nodes; one on each is needed, which "
            "starts a process for every GPU (--ntasks-per-node=1)"
        )
    if count < 1:
        raise UserError(f"--num_machines: {count} is not a number of machines")
    if count == 1:
        return Machines(main_port=options.main_process_port or 0)
    rank = options.machine_rank
    if rank is None and of_slurm:
        rank = _number(environ, "SLURM_NODEID")
    if rank is None and options.dry_run:
        rank = 0
    if rank is None:
        raise UserError("--machine_rank: is not set; number the machines from 0")
    if not 0 <= rank < count:
        raise UserError(
            f"--machine_rank: {rank} is not the number of a machine; they are numbered from 0 to {count - 1}"
        )
    ip = options.main_process_ip or environ.get("MASTER_ADDR") or (_first_node(environ) if of_slurm else "")
    port = options.main_process_port or _number(environ, "MASTER_PORT") or (port_of(environ) if of_slurm else 0)
    if options.dry_run:
        ip, port = ip or "HOST_OF_MACHINE_0", port or FIRST_PORT
    if not ip or not port:
        raise UserError(
            "--main_process_ip and --main_process_port: are not set; name the host of machine 0, and a port that is "
            "free there, the same on all machines"
        )
    return Machines(count, rank, ip, port)


def _number(environ: Mapping[str, str], name: str) -> int:
    """That of an environment variable; 0 where there is none."""
    value = environ.get(name) or "0"
    if not value.isdigit():
        raise UserError(f"{name}: {value!r} (in the environment) is not a number")
    return int(value)


def port_of(environ: Mapping[str, str]) -> int:
    """A port for a SLURM job that its neighbours do not take, and that an earlier attempt does not still hold."""
    job, attempt = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_RESTART_COUNT", "0"))
    return FIRST_PORT + (job * 7 + attempt) % PORTS


def _first_node(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        raise UserError(
            "--main_process_ip: is not set, and `scontrol show hostnames` does not work here (in a container?); set "
            "MASTER_ADDR to the host of the first node"
        ) from None
    return shown.stdout.split()[0]


def own_cores() -> int:
    """Cores that this process may use: a batch system may have given it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
