"""A pytest plugin: a test, or a fixture, that leaves a thread or a process behind fails.

What is left behind goes on while later tests run: it takes their time, writes into their output, and talks to servers
on ports that are theirs by now.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.helpers import FORK_SERVER

MARK = "QA_DIST_TESTS"
"""In the environment of all processes that this one starts, so that those are found whose parent has ended."""
PATIENCE = 30.0
"""Seconds that what has been asked to end may take."""
SHARED_THREADS = ("fsspecIO", "tqdm_monitor")
"""Names of threads that libraries start once for a whole process."""
SHARED_PROCESSES = ("multiprocessing.resource_tracker", "multiprocess.resource_tracker", "slurmd -D -N")
"""Parts of the command lines of processes that libraries start once for a whole process, and of the daemons of the
tests' SLURM: a test that ends one starts it again, for the tests after it."""

Alive = dict[object, str]
"""Thread, or number and start of a process -> what it is, for people."""


def _threads() -> Alive:
    return {
        thread: f"thread {thread.name!r}"
        for thread in threading.enumerate()
        if thread is not threading.current_thread() and not _is_shared(thread)
    }


def _is_shared(thread: threading.Thread) -> bool:
    return thread.name in SHARED_THREADS or type(thread).__name__ == "TMonitor"


class _Processes:
    """Finds the processes that descend from this one."""

    def __init__(self) -> None:
        self.mark = f"{os.getpid()}-{time.time_ns()}"
        os.environ[MARK] = self.mark
        self._others: set[tuple[int, float]] = set()
        """Processes known to be none of ours."""

    def alive(self) -> Alive:
        found: Alive = {}
        others: set[tuple[int, float]] = set()
        own = os.getpid()
        for process in psutil.process_iter():
            try:
                key = (process.pid, process.create_time())
                if key in self._others or process.pid in (own, FORK_SERVER.pid):
                    others.add(key)
                    continue
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get(MARK) != self.mark:
                    if process.ppid() != own:  # between fork and exec a child still has its parent's environment
                        others.add(key)
                    continue
                command = " ".join(process.cmdline())
            except (psutil.Error, OSError):  # it has ended meanwhile, or is another user's
                continue
            if not any(part in command for part in SHARED_PROCESSES):
                found[key] = f"process {process.pid}: {command[:200]}"
        self._others = others
        return found


_processes = _Processes()
_owned: dict[object, Alive] = {}
"""What fixtures that outlive a test have started, by fixture."""


def alive() -> Alive:
    """Return the threads and processes that this process has started and that have not ended, beside its main one."""
    return _threads() | _processes.alive()


def _left(since: Alive, look: Callable[[], Alive] = alive) -> Alive:
    """Return what is alive beside `since` and the fixtures' own, once that is nothing or patience has ended."""
    end = time.monotonic() + PATIENCE
    while True:
        known = set(since).union(*_owned.values())
        left = {key: name for key, name in look().items() if key not in known and not _descends(key, known)}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.02)


def _descends(key: object, known: set[object]) -> bool:
    """Return whether a process was started by one of `known`, such as a daemon of a fixture."""
    if not isinstance(key, tuple):
        return False
    try:
        return any((parent.pid, parent.create_time()) in known for parent in psutil.Process(key[0]).parents())
    except psutil.Error:
        return False


def _fail(who: str, left: Alive) -> None:
    if left:
        pytest.fail(f"{who} left behind: {'; '.join(left.values())}", pytrace=False)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare what is alive before the test and its own fixtures, and after them."""
    before = alive()
    yield
    _fail(request.node.name, _left(before))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Iterator[None]:
    """Note what a fixture starts that outlives the test."""
    if fixturedef.scope == "function":
        return (yield)
    before = alive()
    result = yield
    _owned[fixturedef] = {key: name for key, name in alive().items() if key not in before}
    return result


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Require that what a fixture has started ends with it."""
    own = _owned.pop(fixturedef, None)
    if own:
        _fail(f"the fixture {fixturedef.argname}", _left({}, lambda: {k: v for k, v in alive().items() if k in own}))
