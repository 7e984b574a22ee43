"""That a run directory is one process's own while it writes there."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qa_dist.errors import UserError
from qa_dist.reporting.batch_job import BatchJob
from qa_dist.reporting.status import is_gone, read_status

LOCK = ".lock"
LOST_SECONDS, LEAVING_SECONDS = 150.0, 20.0
"""How long a lock is waited for: one of a machine that has vanished (file servers keep those for 90 seconds), or of a
process that is about to end."""
WATCHED_HERE, WATCHED_ELSEWHERE = 13.0, 75.0
"""How long a run that may have been killed is watched for that; network file systems show news late."""


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
            raise UserError(f"run.output_dir: the run in {path} is still running ({_owner(status)})")
        time.sleep(0.5)


def record_end(path: Path, pid: int, since: float, end: Mapping[str, Any]) -> None:
    """Put `end` (state, reason, exit code) into the status of the run in `path`, whose main process was `pid` on this
    host and has ended without doing so.

    Nothing is written where the status is that of another attempt (another process, or last updated before the time
    `since`), or already tells an end, or where another run has the directory by now.
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks
            pass
        status = read_status(path)
        own = status.get("pid") == pid and status.get("host") == socket.gethostname()
        updated = status.get("updated")
        recent = isinstance(updated, int | float) and updated >= since
        if status.get("state") == "running" and own and recent and is_gone(status):
            temporary = path / ".status.json.tmp"
            temporary.write_text(
                json.dumps({**status, **end, "updated": time.time()}, indent=2, ensure_ascii=False) + "\n"
            )
            temporary.replace(path / "status.json")


def _open_lock(path: Path) -> int:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"run.output_dir: {path} cannot be written: {error.strerror}") from None


def _patience(path: Path, status: Mapping[str, Any]) -> float:
    """How long the lock may be held on by what is no longer meant to run."""
    job = BatchJob.of_this_process()
    if job is not None and status.get("job") == job.name and status.get("attempt") != job.attempt:
        with contextlib.suppress(OSError):
            (path / job._replace(attempt=str(status.get("attempt"))).stop_file).write_text("TERM")
        return LOST_SECONDS
    elsewhere = status.get("host") != socket.gethostname()
    ended = status.get("state") != "running"  # and about to leave
    return LOST_SECONDS if elsewhere else LEAVING_SECONDS if ended else 0.0


def _owner(status: Mapping[str, Any]) -> str:
    host, job = status.get("host"), status.get("job")
    return f"process {status.get('pid')} on {host}" + (f", job {job}" if job else "")


def _require_no_life(path: Path, say: Callable[[str], object]) -> None:
    """The same by the status's signs of life, where there are no locks."""
    status = read_status(path)
    if status.get("state") != "running" or status.get("pid") == os.getpid() or is_gone(status):
        return
    seconds = WATCHED_HERE if status.get("host") == socket.gethostname() else WATCHED_ELSEWHERE
    say(f"{path}: {_owner(status)} did not record its end; checking for {seconds:.0f} s whether it is still running")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(1)
        now = read_status(path)
        if now.get("state") != "running":
            return
        if now.get("updated") != status.get("updated"):
            raise UserError(f"run.output_dir: the run in {path} is still running ({_owner(status)})")
