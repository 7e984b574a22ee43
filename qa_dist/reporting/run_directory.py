"""The run directory: what a run leaves for people and scripts, and how it ended."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qa_dist.errors import NotPushedError, UserError
from qa_dist.launch_directory import is_running
from qa_dist.reporting.environment import environment

METRICS = "metrics.jsonl"
LIFE_SECONDS = 5.0
"""How often status.json says that the run goes on, and how far it is."""
LOCK = ".lock"
LOST_SECONDS, LEAVING_SECONDS = 150.0, 20.0
"""How long a lock is waited for: one of a machine that has vanished (file servers keep those for 90 seconds), or of a
process that is about to end."""
WATCHED_HERE, WATCHED_ELSEWHERE = 13.0, 75.0
"""How long a run that may have been killed is watched for that; network file systems show news late."""
State = Literal["running", "completed", "stopped", "failed"]

OWN_FILES = ("status.json", "config.yaml", "metrics.jsonl", "metrics.json", "predictions.json", "model", "checkpoints")
"""Names whose presence shows that a directory is in use."""


class StoppedError(Exception):
    """The run ends early because it was asked to."""

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason)
        self.exit_code = exit_code


def require_free(path: Path) -> None:
    """Raise `UserError` if `path` holds what a new run would overwrite.

    A run that failed, or was killed, before its first step has left nothing of value: its directory is free.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"run.output_dir: {path} is a file; name a directory")
    in_use = [name for name in OWN_FILES if (path / name).exists()]
    if "checkpoints" in in_use and not any((path / "checkpoints").glob("step_*")):  # one was about to be fetched
        in_use.remove("checkpoints")
    if not in_use:
        return
    status = read_status(path)
    ended = status.get("state") == "failed" or (status.get("state") == "running" and _is_gone(status))
    if ended and status.get("step") == 0 and "model" not in in_use and not _has_trained(path):
        return
    state = f" ({status['state']} at step {status['step']})" if {"state", "step"} <= status.keys() else ""
    raise UserError(
        f"run.output_dir: {path} holds another run{state}, and nothing is overwritten: go on with it (--resume auto), "
        "set --run.output_dir to another directory, or move that one away"
    )


def _has_trained(path: Path) -> bool:
    """Whether a run has left checkpoints or logged steps, whatever its status says: that of a killed one is old."""
    if any((path / "checkpoints").glob("step_*")):
        return True
    metrics = path / "metrics.jsonl"
    return metrics.is_file() and b'"kind": "train"' in metrics.read_bytes()


def require_ended(path: Path, say: Callable[[str], object]) -> None:
    """Raise `UserError` if the run in `path` is still going on."""
    claim(path, say, create=False).close()


class Claim(NamedTuple):
    """That no other process has the run directory, for as long as this is open."""

    descriptor: int | None
    """Of a lock, which the kernel gives back when the process ends; None where the file system has none."""

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


def claim(path: Path, say: Callable[[str], object], *, create: bool = True) -> Claim:
    """Make `path` this process's own. Raises `UserError` if another run is going on there.

    An earlier attempt of the same batch job, which its batch system has given up, is asked to stop, and waited for.
    `say` is told what takes time.
    """
    if not create and not path.is_dir():
        return Claim(None)
    end: float | None = None
    while True:
        descriptor = _open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):  # whoever had it has taken it away
                if os.path.samestat(os.fstat(descriptor), (path / LOCK).stat()):
                    return Claim(descriptor)
            os.close(descriptor)
            continue
        except BlockingIOError:
            os.close(descriptor)
        except OSError:  # a file system without locks
            os.close(descriptor)
            _require_no_life(path, say)
            return Claim(None)
        status = read_status(path)
        if end is None:
            seconds = _patience(path, status)
            end = time.monotonic() + seconds
            if seconds:
                say(f"{path}: waiting up to {seconds:.0f} s for {_owner(status)} to end")
        if time.monotonic() >= end:
            raise UserError(f"run.output_dir: the run in {path} is still going on ({_owner(status)})")
        time.sleep(0.5)


def _open_lock(path: Path) -> int:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"run.output_dir: {path} cannot be written: {error.strerror}") from None


def _patience(path: Path, status: Mapping[str, Any]) -> float:
    """How long the lock may be held on by what is no longer meant to run."""
    if _is_earlier_attempt(status):
        with contextlib.suppress(OSError):
            (path / stop_name(os.environ["SLURM_JOB_ID"], str(status.get("attempt")))).write_text("TERM")
        return LOST_SECONDS
    elsewhere = status.get("host") != socket.gethostname()
    ended = status.get("state") != "running"  # and about to leave
    return LOST_SECONDS if elsewhere else LEAVING_SECONDS if ended else 0.0


def _is_earlier_attempt(status: Mapping[str, Any]) -> bool:
    return status.get("job") == _job() is not None and status.get("attempt") != _attempt()


def _owner(status: Mapping[str, Any]) -> str:
    host, job = status.get("host"), status.get("job")
    return f"process {status.get('pid')} on {host}" + (f", job {job}" if job else "")


def _require_no_life(path: Path, say: Callable[[str], object]) -> None:
    """The same by the status's signs of life, where there are no locks."""
    status = read_status(path)
    if status.get("state") != "running" or status.get("pid") == os.getpid() or _is_gone(status):
        return
    seconds = WATCHED_HERE if status.get("host") == socket.gethostname() else WATCHED_ELSEWHERE
    say(f"{path}: {_owner(status)} has not said that it has ended; seeing for {seconds:.0f} s whether it still lives")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(1)
        now = read_status(path)
        if now.get("state") != "running":
            return
        if now.get("updated") != status.get("updated"):
            raise UserError(f"run.output_dir: the run in {path} is still going on ({_owner(status)})")


def _job() -> str | None:
    """The batch job that this process is part of."""
    number = os.environ.get("SLURM_JOB_ID")
    return f"SLURM {number}" if number else None


def stop_name(job: str, attempt: str) -> str:
    """Of the file that asks an attempt of a batch job to stop; one named `stop` asks whichever run there is."""
    return f"stop-{job}.{attempt}"


def _attempt() -> str:
    """Which one of that job."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def read_status(path: Path) -> dict[str, Any]:
    """The content of a run's status.json; empty if there is none that can be read."""
    try:
        status = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _is_gone(status: dict[str, Any]) -> bool:
    """Whether the process that wrote `status` is known to have ended: only on its own host can one tell."""
    if status.get("host") != socket.gethostname() or not isinstance(status.get("pid"), int):
        return False
    return not is_running(status["pid"])


class RunDirectory:
    """The directory of this run. On all but the main process every method does nothing."""

    def __init__(self, path: Path, is_main: bool):
        self.path = path
        self.is_main = is_main
        self.step = 0
        """Optimizer steps done; part of the status."""
        self.id = ""
        """Of the run: the same from its first start to its end, on whatever machines."""
        self.hub: dict[str, Any] | None = None
        """How its pushes have gone; part of the status."""
        self._launch = ""
        self._lock = threading.Lock()
        self._claim: Claim | None = None
        self._is_open = False
        self._has_ended = False

    @property
    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl; 0 on all but the main process."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if self.is_main and path.is_file() else 0

    def claim(self, say: Callable[[str], object]) -> None:
        """See to it that no other run writes here until `close`. Raises `UserError`."""
        if self.is_main:
            self._claim = claim(self.path, say)

    def close(self) -> None:
        """Let others have the directory; it goes if nothing came into it."""
        if self._claim is not None:
            with contextlib.suppress(OSError):
                if not self._is_open and [entry.name for entry in self.path.iterdir()] == [LOCK]:
                    (self.path / LOCK).unlink()
                    self.path.rmdir()
            self._claim.close()
            self._claim = None

    def open(self, config_yaml: str, launch: str, *, is_own: bool = False, goes_on: bool = False) -> None:
        """Make the directory, write the config, and say that the run is running, and how it was launched.

        `is_own`: what is in the directory is of an earlier attempt at this run. `goes_on`: and it is still of use, so
        that nothing but the status is written until `go_on`. Raises `UserError` if the directory holds another run or
        cannot be written.
        """
        if not self.is_main:
            return
        if not is_own:
            require_free(self.path)
        self._launch = launch
        self._is_open = True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not goes_on:
                self.go_on(config_yaml, 0)
            self._status("running", "", None)
            self.write_json("environment.json", environment(launch))
        except OSError as error:
            raise UserError(f"run.output_dir: {self.path} cannot be written: {error.strerror}") from None

    def go_on(self, config_yaml: str, metrics_bytes: int, state: Path | None = None) -> None:
        """Write the config, and make metrics.jsonl what it was when `state` was written, or keep so many bytes of it:
        what comes after them is done again."""
        if not self.is_main:
            return
        path = self.path / METRICS
        if state is not None and (state / METRICS).is_file():
            temporary = self.path / f".{METRICS}.tmp"
            shutil.copyfile(state / METRICS, temporary)
            temporary.replace(path)
        elif metrics_bytes == 0:
            path.unlink(missing_ok=True)
        elif self.metrics_bytes > metrics_bytes:
            os.truncate(path, metrics_bytes)
        self.write("config.yaml", config_yaml)

    def copy_metrics(self, directory: Path, size: int) -> None:
        """Put the first `size` bytes of metrics.jsonl into `directory`."""
        if self.is_main and size:
            with (self.path / METRICS).open("rb") as file:
                (directory / METRICS).write_bytes(file.read(size))

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Around all that follows `open`: keep status.json true to how far the run is, and how it ends."""
        leaving = threading.Event()
        if self.is_main:
            threading.Thread(target=self._show_life, args=(leaving,), name="status", daemon=True).start()
        try:
            yield
        except StoppedError as stop:
            self._end("stopped", str(stop), stop.exit_code)
            raise
        except NotPushedError as error:
            self._end("completed", str(error), error.exit_code)
            raise
        except KeyboardInterrupt:
            self._end("stopped", "interrupted at once by a second signal", 130)
            raise
        except UserError as error:
            self._end("failed", str(error), error.exit_code)
            raise
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}", 1)
            raise
        finally:
            leaving.set()
        self._end("completed", "", 0)

    def _show_life(self, leaving: threading.Event) -> None:
        while not leaving.wait(LIFE_SECONDS):
            with contextlib.suppress(OSError):
                self._status("running", "", None)

    def fail(self, reason: str) -> None:
        """The process is about to end, from whichever thread finds that it has to."""
        self._end("failed", reason, 1)

    def _end(self, state: State, reason: str, exit_code: int) -> None:
        # a disk that is full for this too: the error that ends the run is the one to be told
        if self._is_open:
            with contextlib.suppress(OSError):
                self._status(state, reason, exit_code)

    def _status(self, state: State, reason: str, exit_code: int | None) -> None:
        content = {"state": state, "reason": reason, "step": self.step, "exit_code": exit_code, "updated": time.time()}
        own = {"launch": self._launch, "host": socket.gethostname(), "pid": os.getpid(), "run": self.id}
        if job := _job():  # which attempt of it this is, its batch script wants to know
            own |= {"job": job, "attempt": _attempt()}
        with self._lock:
            if not self._has_ended:
                self._has_ended = exit_code is not None
                self.write_json("status.json", content | own | ({"hub": self.hub} if self.hub else {}))

    def write_json(self, name: str, content: Any) -> None:
        self.write(name, json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write(self, name: str, content: str) -> None:
        """Replace a file as a whole."""
        if not self.is_main:
            return
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(self.path / name)

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self.is_main:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(values), allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    """`content` with null for numbers that JSON does not have."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list) else content
