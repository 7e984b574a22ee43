"""A real SLURM of several nodes on this machine: loopback only, without systemd, for root and for ordinary users.

    with SlurmCluster(tmp_path / "slurm") as cluster:
        job = cluster.submit(script, flags=["--nodes=2", "--ntasks-per-node=1"])
        cluster.wait(job, {"COMPLETED"}, timeout=60)

A node is a slurmd of its own. All nodes share this machine's processors, files and host name.
"""

import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
"""Daemons are often not on an ordinary user's PATH."""

START_TIMEOUT = 30.0

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job is eligible again cred_expire + 1 seconds later; less than 5 is refused (and 120 taken)
AuthInfo=socket={run}/munge,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/%n.pid
FirstJobId={first_job}
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
MinJobAge=86400
BatchStartTimeout=10
MessageTimeout={message_timeout}
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
UnkillableStepTimeout={unkillable}
"""

PREEMPTION = """\
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

ONE_PARTITION = "PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


def missing() -> str | None:
    """Why no SLURM can be started here (which programs are missing), or None."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class SlurmCluster:
    """Nodes are named like loopback addresses, which need no entry in /etc/hosts; no two clusters share a name."""

    def __init__(
        self,
        directory: Path,
        nodes: int = 3,
        *,
        kill_wait: int = 30,
        slurmd_timeout: int = 20,
        proctrack: str = "linuxproc",
        cpus: int = 4,
        gpus: int = 0,
        preemption: bool = False,
        grace: int = 0,
        config: str = "",
    ):
        """`directory` gets configuration and logs; `cpus` and `gpus` are per node, and need not exist.

        `preemption`: jobs of the partition `high` requeue those of `low`, the default. With `grace`, tasks (not the
        batch shell) get SIGTERM that many seconds before, or up to 30 more. `config`: further lines of slurm.conf.
        """
        self.directory = directory.absolute()
        self.kill_wait, self.slurmd_timeout, self.proctrack = kill_wait, slurmd_timeout, proctrack
        self.cpus, self.gpus, self.preemption, self.grace, self.config = cpus, gpus, preemption, grace, config
        network = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
        self.nodes = [f"{network}.{i}" for i in range(11, 11 + nodes)]
        self.environment = {k: v for k, v in os.environ.items() if not re.match(r"S(LURM|BATCH|QUEUE|INFO|CANCEL)", k)}
        self.environment |= {"PATH": PATH, "SLURM_CONF": str(self.directory / "slurm.conf")}
        self._run: Path | None = None
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when all nodes are idle; RuntimeError with the ends of the logs when they aren't after 30 s."""
        try:
            deadline = time.monotonic() + START_TIMEOUT
            run = self._configure()
            munge = [f"--{name}-file={run / name}" for name in ("key", "pid", "seed")]
            self._start("munged", "munged", "--foreground", f"--socket={run / 'munge'}", *munge)
            self._until((run / "munge").exists, deadline, "munged")
            self._start("slurmctld", "slurmctld", "-D")
            self._until(lambda: "is UP" in self._answer("scontrol", "ping"), deadline, "slurmctld")
            for name in self.nodes:
                self.start_node(name)
            idle = {f"{name} idle" for name in self.nodes}
            self._until(lambda: set(self._answer("sinfo", "-hNo", "%N %T").splitlines()) == idle, deadline, "nodes")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends all daemons, jobs and what jobs left, at once and however far the start had come."""
        daemons = {daemon.pid for daemon in self._daemons.values() if daemon.poll() is None}

        def left() -> list[psutil.Process]:
            of_nodes = [process for name in self.nodes for process in self._marked(name)]
            return _with_descendants([*of_nodes, *(process for process in _alive() if process.pid in daemons)])

        if self._run is not None:
            _kill(left)
            shutil.rmtree(self._run, ignore_errors=True)
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        self._run = None

    def submit(
        self,
        script: Path,
        *args: str,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> int:
        """The job's id. Its output is in `cwd`, by default the cluster's directory, unless `flags` say otherwise."""
        answer = self._call(["sbatch", "--parsable", *flags, str(script), *args], env or {}, cwd or self.directory)
        return int(answer.split(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, ExitCode, Restarts, BatchHost and so on."""
        record = self.command("scontrol", "show", "job", "-o", str(job_id)).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)", record))

    def wait(self, job_id: int, states: Container[str], timeout: float) -> dict[str, str]:
        """Until the job is in one of `states`."""
        deadline = time.monotonic() + timeout
        while (job := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job_id} after {timeout} s: {job}\n{self._logs()}")
            time.sleep(0.2)
        return job

    def command(self, *args: str) -> str:
        """The output of scontrol, scancel, squeue and so on."""
        return self._call(args)

    def kill_node(self, name: str) -> None:
        """Kills the slurmd and all that its jobs run there, before any of it can tell the controller."""
        _kill(lambda: _with_descendants(self._marked(name)))

    def kill_daemon(self, name: str) -> None:
        """Kills the slurmd of a node; its jobs go on."""
        daemon = self._daemons[name]
        daemon.kill()
        daemon.wait()

    def start_node(self, name: str) -> None:
        """Starts the node's slurmd, again or for the first time; doesn't wait for it."""
        self._start(name, "slurmd", "-D", "-N", name)

    def processes(self, node: str | None = None, containing: str = "") -> list[psutil.Process]:
        """Those of jobs, on one node or all, with `containing` in their command line; slurmd and slurmstepd aren't."""
        nodes = self.nodes if node is None else [node]
        found: list[psutil.Process] = []
        for process in _alive():
            with suppress(psutil.Error):
                ours = process.environ().get("SLURMD_NODENAME") in nodes
                if ours and containing in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def _configure(self) -> Path:
        """Makes the directory of sockets and state: short names, and munged wants it open to be passed through."""
        if self._run is not None:
            raise RuntimeError("the cluster runs")
        base = tempfile.gettempdir()
        self._run = run = Path(tempfile.mkdtemp(prefix="slurm-", dir=base if len(base) < 40 else "/tmp"))
        run.chmod(0o711)
        for name in ("state", *self.nodes):
            (run / name).mkdir()
        key = run / "key"
        key.touch(0o600)
        key.write_bytes(random.randbytes(128))
        ports = _free_ports(1 + len(self.nodes))
        text = CONFIG.format(
            host=socket.gethostname().split(".")[0],
            port=ports[0],
            user=os.getuid(),
            run=run,
            first_job=random.randrange(1000, 10_000_000),
            proctrack=self.proctrack,
            kill_wait=self.kill_wait,
            slurmd_timeout=self.slurmd_timeout,
            message_timeout=max(2, min(10, self.slurmd_timeout // 2)),
            unkillable=self.kill_wait + 60,
        )
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        text += "GresTypes=gpu\n" if self.gpus else ""
        for name, port in zip(self.nodes, ports[1:], strict=True):
            text += f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            text += f" CPUs={self.cpus} RealMemory=1000000{gres}\n"
        text += PREEMPTION.format(grace=self.grace) if self.preemption else ONE_PARTITION
        text += self.config + "\n"
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "slurm.conf").write_text(text)
        for i in range(self.gpus):
            (run / f"gpu{i}").symlink_to("/dev/null")
        if self.gpus:
            devices = (f"Name=gpu File={run}/gpu{i}\n" for i in range(self.gpus))
            (self.directory / "gres.conf").write_text("".join(devices))
        return run

    def _start(self, name: str, *command: str) -> None:
        """In a directory by which the processes of a node are known: slurmstepd keeps it, but not its environment."""
        assert self._run is not None
        with (self.directory / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                cwd=self._run / name if name in self.nodes else self._run,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _marked(self, node: str) -> list[psutil.Process]:
        """slurmd, slurmstepd and processes of jobs, but for those with another environment."""
        assert self._run is not None
        found: list[psutil.Process] = []
        for process in _alive():
            with suppress(psutil.Error):
                daemon = process.name().startswith("slurm") and process.cwd() == str(self._run / node)
                if daemon or process.environ().get("SLURMD_NODENAME") == node:
                    found.append(process)
        return found

    def _call(self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment | dict(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}{done.stdout}")
        return done.stdout

    def _answer(self, *command: str) -> str:
        """The same while the controller may not be there yet: empty, then."""
        try:
            return self._call(command)
        except RuntimeError:
            return ""

    def _until(self, ready: Callable[[], bool], deadline: float, what: str) -> None:
        while not ready():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                why = f"{', '.join(ended)} ended" if ended else f"{what} not ready in {START_TIMEOUT:.0f} s"
                raise RuntimeError(f"SLURM did not start: {why}\n{self._logs()}")
            time.sleep(0.05)

    def _logs(self) -> str:
        tails = ((p, p.read_text(errors="replace").splitlines()[-25:]) for p in self.directory.glob("*.log"))
        return "\n".join(line for path, tail in tails for line in (f"--- {path.name}", *tail))


def _free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to outgoing connections, so that a node can have its port again."""
    ports: list[int] = []
    for port in random.sample(range(12_000, 32_000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"fewer than {count} free ports")


def _alive() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _with_descendants(roots: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Daemons first, so that none outlives what it watches."""
    found = {process.pid: process for process in roots}
    everyone = list(_alive())
    before = -1
    while before != (before := len(found)):
        for process in everyone:
            with suppress(psutil.Error):
                if process.ppid() in found:
                    found.setdefault(process.pid, process)
    return sorted(found.values(), key=lambda process: not _name(process).startswith("slurm"))


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""  # it has just ended


def _kill(find: Callable[[], list[psutil.Process]]) -> None:
    """Again and again until none is found, for some may have been about to start others."""
    deadline = time.monotonic() + 10
    while found := find():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not killed: {found}")
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)
