"""Requests to stop (signals, a stop file, the end of the time there is), on which all ranks act at the same point."""

import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType

import torch

from qa_dist.config import RunConfig
from qa_dist.errors import TIME_IS_UP
from qa_dist.launch_directory import ECHO_SECONDS, STOP_SIGNALS, LaunchDirectory
from qa_dist.reporting.batch_job import BatchJob
from qa_dist.reporting.run_directory import StoppedError
from qa_dist.training.engine import Engine

POLL_SECONDS = 0.1
STOP_FILE_SECONDS = 0.2
"""How often the stop file is looked for, which may lie on a disk of the network."""

Request = tuple[str, int]
"""Why to stop, and the exit code."""
Source = Callable[[], Request | None]
"""Something that may ask for a stop; looked at every `POLL_SECONDS`, in a thread."""


def by_signal(number: int) -> Request:
    return f"stopped by signal {number} ({signal.Signals(number).name})", 128 + number


class StopRequest:
    """Remembers the first reason for which this process was asked to stop."""

    request: Request | None = None
    say: Callable[[str], object] = staticmethod(lambda text: None)
    """Called with a message for the user once there is a request."""
    _noted_at = 0.0

    @property
    def is_asked(self) -> bool:
        return self.request is not None

    @contextlib.contextmanager
    def listening(self, sources: Sequence[Source] = ()) -> Iterator[None]:
        """Note the first of `STOP_SIGNALS` instead of dying of it, and what `sources` say; a later signal stops at
        once."""
        # A launcher has its processes ignore signals until now; nohup has them ignore SIGHUP, and means it.
        by_nohup = LaunchDirectory.of_this_process() is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        listened = [number for number in STOP_SIGNALS if not (by_nohup and number == signal.SIGHUP)]
        previous = {number: signal.signal(number, self._note) for number in listened}
        ended = threading.Event()
        watcher = threading.Thread(target=self._look, args=(list(sources), ended), name="stop requests", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join(timeout=2)  # it may hang in a disk of the network
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.request is None:
            self.request, self._noted_at = by_signal(number), time.monotonic()
        elif time.monotonic() - self._noted_at > ECHO_SECONDS:
            raise KeyboardInterrupt

    def _look(self, sources: Sequence[Source], ended: threading.Event) -> None:
        while self.request is None and not ended.wait(POLL_SECONDS):
            for source in sources:
                if request := source():
                    self._noted_at = time.monotonic()
                    self.request = self.request or request
        if self.request is not None:
            self.say(f"{self.request[0]}; this takes effect after the current step or batch")

    def raise_if_any(self, engine: Engine) -> None:
        """Raise `StoppedError` on all ranks if any of them was asked to stop. All ranks have to call this."""
        flag = torch.tensor(float(self.is_asked), device=engine.device)
        if engine.sum(flag).item():
            raise self.error(engine)

    def error(self, engine: Engine) -> StoppedError:
        """What to raise on all ranks once they have agreed to stop: the reason of the first that has one."""
        found = [request for request in engine.gather(self.request) if request]
        reason, code = found[0]
        return StoppedError(reason, code)


# ------------------------------------------------------------------------------------------- sources


def sources_for(config: RunConfig, is_main: bool) -> list[Source]:
    """What may ask a run to stop besides signals."""
    sources: list[Source] = []
    if directory := LaunchDirectory.of_this_process():
        sources.append(lambda: by_signal(number) if (number := directory.stop_signal()) else None)
    if is_main:
        names = ["stop"]
        if job := BatchJob.of_this_process():
            names.append(job.stop_file)
        for name in names:
            sources.append(every(STOP_FILE_SECONDS, lambda path=config.output_dir / name: stop_file(path)))
        sources += [at_time(*limit) for limit in time_limits(config)]
    return sources


def every(seconds: float, source: Source) -> Source:
    """`source`, asked no more often than that."""
    last = -math.inf

    def asked() -> Request | None:
        nonlocal last
        if time.monotonic() - last < seconds:
            return None
        last = time.monotonic()
        return source()

    return asked


def stop_file(path: Path) -> Request | None:
    """A request if there is such a file, which is taken away: one that is empty, or names a signal (USR1)."""
    try:
        name = path.read_text(encoding="utf-8", errors="replace").strip().upper()
    except OSError:
        return None
    with contextlib.suppress(OSError):
        path.unlink()
    number = getattr(signal, f"SIG{name.removeprefix('SIG')}", None)
    return (
        by_signal(number)
        if number is not None and number in STOP_SIGNALS
        else (f"stopped because of the file {path}", 128 + signal.SIGINT)
    )


def at_time(moment: float, what: str) -> Source:
    """A request from `moment` (monotonic seconds) on."""
    return lambda: (what, TIME_IS_UP) if time.monotonic() >= moment else None


def time_limits(config: RunConfig) -> list[tuple[float, str]]:
    """When the run has to stop (monotonic seconds), and why."""
    limits = []
    if config.run.max_hours is not None:
        hours = config.run.max_hours
        limits.append(
            (time.monotonic() + 3600 * hours, f"stopped: the time limit run.max_hours ({hours:g}) is reached")
        )
    end = slurm_end_time()
    left = 0.0 if end is None else end - time.time()
    if left > 0:  # else the clocks differ, or the system has not ended the job
        margin = min(60 * config.run.end_margin_minutes, left / 4)  # a short job is not to end before it has begun
        limits.append((time.monotonic() + left - margin, "stopped: the SLURM job's time limit is near"))
    return limits


def slurm_end_time() -> float | None:
    """When SLURM ends the job that this process is part of (seconds since the epoch); None where that is not known."""
    job = BatchJob.of_this_process()
    if job is None:
        return None
    if known := os.environ.get("SLURM_JOB_END_TIME", ""):
        return float(known) if known.isdigit() else None
    command = ["squeue", "--noheader", "--format=%e", "--jobs", job.number]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        return datetime.fromisoformat(shown).timestamp()
    return None  # no limit, or no SLURM commands in this container
