"""Pushes in the background: one worker, the newest wins, and no trouble is lost or able to stop training."""

import random
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qa_dist.checkpoint.attempt import Attempt, CancelledError
from qa_dist.checkpoint.hub_client import HubError, Remedy

Lane = Literal["state", "model"]
"""What is pushed: the state of training, or the model that people load. Each has a branch of its own."""

MOST_PER_HOUR = 100
"""Commits. The Hub stops taking them at about 128 an hour and repository."""
RESERVED = 6
"""Of them for the last pushes of a run."""
MOST_REFUSALS = 4
"""Tries of one push that the Hub refuses, before it is given up: a refusal may be a flaw that passes."""
FIRST_WAIT, LONGEST_WAIT = 2.0, 120.0
"""Seconds before the second try, and before any later one."""
STUCK, STUCK_ALONE = 60.0, 300.0
"""Seconds without progress after which a try is cancelled: where another push waits, and where none does. Xet takes an
answer after a minute for a healthy one."""
GRACE = 5.0
"""Seconds that a cancelled try has to end; then it is left behind."""
CHECK = 0.5
"""Seconds from one look at a try to the next."""


class Clock:
    """The time. Tests have another one."""

    def now(self) -> float:
        """Seconds."""
        return time.monotonic()

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        """Wait until `condition` is notified, at most so long."""
        condition.wait(seconds)


@dataclass(frozen=True)
class Push:
    """What is to be on a branch, as one commit."""

    lane: Lane
    step: int
    directory: Path
    """The files, in a directory that nobody else changes; it is removed when the push has ended."""
    complete: Callable[[Path], Path] | None = None
    """Adds to `directory` what takes a while to make, and returns the part of it that is pushed; in the worker
    thread. None: everything is there."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.lane} of step {self.step}"


@dataclass(frozen=True)
class Event:
    """Something that has happened to a push."""

    push: Push
    what: Literal["pushed", "superseded", "failed", "retrying"]
    reason: str = ""
    """Why it failed, or has to be tried again."""
    seconds: float = 0.0
    """From its submission."""

    def __str__(self) -> str:
        text = f"hub: {self.push.name} {self.what}"
        return f"{text}: {self.reason}" if self.reason else text


@dataclass
class Summary:
    """How all pushes have ended."""

    pushed: list[str] = field(default_factory=list)
    superseded: list[str] = field(default_factory=list)
    """Never pushed, as newer ones were there before their turn."""
    failed: dict[str, str] = field(default_factory=dict)
    """Push -> why."""
    missing: dict[str, str] = field(default_factory=dict)
    """Of the newest push of each lane those that are not on the Hub -> why."""

    def __str__(self) -> str:
        failed = "".join(f"; {name}: {reason}" for name, reason in self.failed.items())
        return f"hub: {len(self.pushed)} pushed, {len(self.superseded)} superseded, {len(self.failed)} failed{failed}"


@dataclass
class _Job:
    push: Push
    order: int
    submitted: float
    due: float
    """When to try it (again)."""
    tries: int = 0
    refusals: int = 0
    problem: str = ""


@dataclass
class _Outcome:
    """Of one try."""

    is_known: bool = False
    error: HubError | None = None


class PushQueue:
    """One worker thread and, for each lane, at most one push that waits."""

    def __init__(self, do: Callable[[Push, Callable[[], None]], None], clock: Clock | None = None):
        """`do` pushes, or raises `HubError`; in the worker thread. It calls its second argument before every commit."""
        self._do = do
        self._clock = clock or Clock()
        self._changed = threading.Condition()
        self._waiting: dict[Lane, _Job] = {}
        self._active: _Job | None = None
        self._commits: deque[float] = deque()
        self._paused_until = 0.0
        self._closing = False
        self._count = 0
        self._events: list[Event] = []
        self._summary = Summary()
        self._newest: dict[Lane, Push] = {}
        self._landed: dict[Lane, Push] = {}
        self._thread = threading.Thread(target=self._work, name="push-queue", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------------------------------- for other threads

    def submit(self, push: Push) -> None:
        """Push soon; instead of an older push of the lane that still waits."""
        with self._changed:
            self._count += 1
            now = self._clock.now()
            older = self._waiting.get(push.lane)
            self._newest[push.lane] = push
            self._waiting[push.lane] = _Job(push, self._count, now, now)
            if older is not None:
                self._end(older, "superseded", older.problem)
            self._changed.notify_all()

    def events(self) -> list[Event]:
        """What has happened since the last call."""
        with self._changed:
            events, self._events = self._events, []
            return events

    @property
    def status(self) -> str:
        """A few words on what is going on; empty where nothing is."""
        active, waiting = self._active, list(self._waiting.values())
        if active is not None:
            return f"pushing {active.push.name}" + (f" (try {active.tries})" if active.tries > 1 else "")
        troubled = next((job for job in waiting if job.problem), None)
        if troubled is not None:
            return f"{troubled.push.name} will be tried again: {troubled.problem}"
        return f"{waiting[0].push.name} waits" if waiting else ""

    def give_up(self, push: Push, reason: str) -> None:
        """Take note of a push that cannot even be tried."""
        with self._changed:
            self._newest[push.lane] = push
            self._end(_Job(push, 0, self._clock.now(), 0.0), "failed", reason)

    def drain(
        self, seconds: float, give_up: Callable[[], bool] = lambda: False, tell: Callable[[], None] = lambda: None
    ) -> Summary:
        """Wait until nothing is left to push, at most so long and until `give_up`. `tell` is called now and then. Call
        it once, when all has been submitted."""
        end = time.monotonic() + seconds
        with self._changed:
            self._closing = True
            for job in self._waiting.values():
                job.due = min(job.due, self._clock.now())  # this is the last chance
            self._changed.notify_all()
            while (self._waiting or self._active) and (left := end - time.monotonic()) > 0 and not give_up():
                self._changed.wait(min(left, 0.5))
                tell()
            for job in [*self._waiting.values(), *([self._active] if self._active else [])]:
                waited = "not waited for" if time.monotonic() < end else f"not done within {seconds:g} s"
                self._end(job, "failed", f"{waited}: {job.problem or 'the Hub has not answered'}")
            self._waiting.clear()
            self._active = None  # it is cancelled, and not waited for
            self._changed.notify_all()
            summary = self._summary
            for lane, push in self._newest.items():
                if self._landed.get(lane) is not push:
                    summary.missing[push.name] = summary.failed.get(push.name, "it was not pushed")
            return summary

    def close(self, seconds: float = 2.0) -> None:
        """End the worker, and wait for that at most so long: what waits is dropped, and nothing is tried again. To be
        called whether or not the queue was drained."""
        with self._changed:
            self._closing = True
            for job in self._waiting.values():
                shutil.rmtree(job.push.directory, ignore_errors=True)
            self._waiting.clear()
            self._active = None
            self._changed.notify_all()
        self._thread.join(seconds)

    # ---------------------------------------------------------------------------------------------- the worker

    def _work(self) -> None:
        while True:
            with self._changed:
                job = self._take()
                if job is None:
                    return
            error = self._try(job)
            with self._changed:
                if self._active is job:  # else drain has given it up
                    self._active = None
                    self._settle(job, error)
                self._changed.notify_all()

    def _try(self, job: _Job) -> HubError | None:
        """Push once, in a thread that can be left behind: what hangs in it may not be stoppable. Return what went
        wrong."""
        attempt, outcome = Attempt(), _Outcome()

        def push() -> None:
            try:
                with attempt:
                    self._do(job.push, lambda: self._count_commit(attempt))
            except HubError as raised:
                outcome.error = raised
            except CancelledError as raised:
                outcome.error = HubError(str(raised), Remedy.RETRY)
            except Exception as raised:  # a bug must be heard, and not end the thread
                outcome.error = HubError(f"{type(raised).__name__}: {raised}", Remedy.MEND)
            with self._changed:
                outcome.is_known = True
                self._changed.notify_all()

        threading.Thread(target=push, name=f"push-{job.push.lane}", daemon=True).start()
        with self._changed:
            while not outcome.is_known:
                self._changed.wait(CHECK)
                if self._active is not job:  # drain has given it up, or the queue was closed
                    attempt.cancel()
                    self._changed.wait_for(lambda: outcome.is_known, GRACE)
                    return None
                if attempt.cancel_if_stuck(STUCK if self._is_waited_for() else STUCK_ALONE):
                    # A cancelled try commits nothing, whatever becomes of its thread.
                    self._changed.wait_for(lambda: outcome.is_known, GRACE)
                    break
            if not outcome.is_known:
                return HubError(f"no progress, so it was cancelled: {attempt.problem}".rstrip(": "), Remedy.RETRY)
            if outcome.error is not None and attempt.is_cancelled:
                reason = f"no progress, so it was cancelled: {attempt.problem or outcome.error}"
                return HubError(reason, outcome.error.remedy)
            return outcome.error

    def _is_waited_for(self) -> bool:
        """Return whether another push could be tried now."""
        now = self._clock.now()
        return self._paused_until <= now and any(job.due <= now for job in self._waiting.values())

    def _take(self) -> _Job | None:
        """The next push whose time has come, made the active one; None once there will be no more."""
        while True:
            if self._closing and not self._waiting:
                return None
            now = self._clock.now()
            job = min(self._waiting.values(), key=lambda job: (job.due, job.order), default=None)
            if job is None:
                self._clock.wait(self._changed, None)
                continue
            ready = max(job.due, self._paused_until, self._next_commit(now))
            if ready > now:
                self._clock.wait(self._changed, ready - now)
                continue
            del self._waiting[job.push.lane]
            job.tries += 1
            self._active = job
            return job

    def _next_commit(self, now: float) -> float:
        """When the Hub may be given another commit."""
        while self._commits and self._commits[0] <= now - 3600:
            self._commits.popleft()
        most = MOST_PER_HOUR - (0 if self._closing else RESERVED)
        # A push may take two: itself, and one that squashes the branch.
        return now if len(self._commits) + 2 <= most else self._commits[1 - most] + 3600

    def _count_commit(self, attempt: Attempt) -> None:
        attempt.require()
        with self._changed:
            self._commits.append(self._clock.now())

    def _settle(self, job: _Job, error: HubError | None) -> None:
        """After a try."""
        now = self._clock.now()
        if error is None:
            return self._end(job, "pushed")
        job.problem = str(error)
        job.refusals += error.remedy is Remedy.MEND
        if error.retry_after:
            self._paused_until = now + error.retry_after
        if error.remedy is Remedy.NONE or job.refusals >= MOST_REFUSALS:
            return self._end(job, "failed", job.problem)
        if job.push.lane in self._waiting:
            return self._end(job, "superseded", job.problem)
        wait = 0.0
        if error.remedy is not Remedy.REREAD or job.tries > 3:
            longest = LONGEST_WAIT if not self._closing else 10.0
            wait = random.uniform(0.5, 1.0) * min(FIRST_WAIT * 2 ** (job.tries - 1), longest)
        job.due = now + wait
        self._waiting[job.push.lane] = job
        self._events.append(Event(job.push, "retrying", job.problem, now - job.submitted))
        return None

    def _end(self, job: _Job, what: Literal["pushed", "superseded", "failed"], reason: str = "") -> None:
        name = job.push.name
        if what == "failed":
            self._summary.failed[name] = reason
        else:
            self._summary.failed.pop(name, None)
            (self._summary.pushed if what == "pushed" else self._summary.superseded).append(name)
        if what == "pushed":
            self._landed[job.push.lane] = job.push
        self._events.append(Event(job.push, what, reason, self._clock.now() - job.submitted))
        shutil.rmtree(job.push.directory, ignore_errors=True)
