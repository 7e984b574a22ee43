"""Watches over the processes of one machine, from their start to the last of them, and says how they ended."""

import contextlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import psutil

from qa_dist.errors import listing
from qa_dist.launch_directory import ECHO_SECONDS, STOP_SIGNALS, Exit, LaunchDirectory, Note

POLL_SECONDS = 0.2
ORPHAN_SECONDS = 40.0
"""How long processes whose launcher underneath is gone have to end with a checkpoint."""
TOGETHER_SECONDS = 5.0
"""Processes that end so soon after each other do so by themselves, not because the launcher underneath has them end."""
BARRIER_SECONDS = 20.0
"""How long the launcher underneath may outlive its processes."""
AT_ONCE_SECONDS = 5.0
"""How long after a second signal."""


class Outcome(NamedTuple):
    """How a launch has ended."""

    code: int
    """Exit code: that of the processes."""
    in_order: bool
    """Whether all of them have come to their end by themselves, done or stopped."""
    lines: list[str]
    """For people, the cause last."""
    main_pid: int | None = None
    """Of the main process; None if it did not run on this machine."""


def supervise(arguments: Sequence[str], environment: Mapping[str, str], say: Callable[[str], object]) -> Outcome:
    """Run `accelerate launch` with `arguments` until all its processes have ended.

    A signal asks them to stop: they end after the step they are in, with a checkpoint. A second one, after
    `ECHO_SECONDS`, ends them at once.
    """
    path = Path(tempfile.mkdtemp(prefix="qa_dist_launch_"))
    try:
        with _Supervisor(arguments, environment, LaunchDirectory(path), say) as supervisor:
            supervisor.watch()
        outcome = supervisor.outcome()
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return outcome


class _Supervisor:
    """Of one launch: its processes run inside `with`, and none is left behind."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        directory: LaunchDirectory,
        say: Callable[[str], object],
    ):
        self.command = [sys.executable, "-m", "qa_dist.launching.agent", *arguments]
        self.environment = {**os.environ, **environment, **directory.environment()}
        self.directory = directory
        self.say = say
        self.notes: dict[int, Note] = {}
        """By rank; kept here too, since people clean /tmp."""
        self.gone: dict[int, float] = {}
        """Ranks that have ended without a word, and when that was seen."""
        self.asked = 0
        """The first signal that asked for a stop."""
        self.asked_again = False
        self.is_done = False
        """Whether only the launcher underneath was left."""
        self._asked_at = 0.0

    def __enter__(self) -> "_Supervisor":
        # nohup has a process ignore SIGHUP, and means it
        by_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        listened = [number for number in STOP_SIGNALS if not (by_nohup and number == signal.SIGHUP)]
        self._previous = {number: signal.signal(number, self._on_signal) for number in listened}
        # In a session of its own, so that Ctrl-C reaches this process alone.
        self.agent = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
        if self.asked:
            self._send(self.asked)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._asked_at = number, time.monotonic()
            self.directory.ask_to_stop(number)  # for those that do not listen to signals yet
            if hasattr(self, "agent"):
                self._send(number)
        elif time.monotonic() - self._asked_at > ECHO_SECONDS:
            self.asked_again = True

    def watch(self) -> None:
        """Return when the launcher underneath and all its processes have ended, or have to be killed."""
        told = False
        deadline = math.inf
        while self.agent.poll() is None or self._running():
            self._look()
            if self.asked and not told:
                told = True
                name = signal.Signals(self.asked).name
                self.say(f"{name}: stopping after the current step, with a checkpoint")
            if self.asked_again and deadline == math.inf:
                self.say("stopping at once")
                self._send(signal.SIGTERM)
                deadline = time.monotonic() + AT_ONCE_SECONDS
            if self.agent.returncode is not None and deadline == math.inf:
                # Killed, or at its end a moment before the processes. They are not left to train unwatched.
                self.directory.ask_to_stop(self.asked or signal.SIGTERM)
                self._send(self.asked or signal.SIGTERM)
                deadline = time.monotonic() + ORPHAN_SECONDS
            if self._has_nothing_left() and deadline == math.inf:
                self.is_done = True  # it waits for the launchers of other machines, which may be gone
                deadline = time.monotonic() + BARRIER_SECONDS
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        self._look()

    def _has_nothing_left(self) -> bool:
        """Whether all processes have said that they end, and are gone."""
        if not self.notes or any(note.code is None or note.is_running for note in self.notes.values()):
            return False
        try:
            return not psutil.Process(self.agent.pid).children()
        except psutil.Error:
            return True

    def _look(self) -> None:
        self._read_notes()
        for note in self.notes.values():
            if note.code is None and not note.is_running:
                self.gone.setdefault(note.rank, time.time())

    def _read_notes(self) -> None:
        self.notes = self.notes | {note.rank: note for note in self.directory.notes()}  # anew: a signal may come in

    def _running(self) -> list[Note]:
        """Those that have not said that they end, and are there."""
        return [note for note in self.notes.values() if note.code is None and note.is_running]

    def _send(self, number: int) -> None:
        """A signal to the processes: they listen to it as soon as there is a run to be stopped."""
        self._look()
        for note in self._running():
            with contextlib.suppress(OSError):
                os.kill(note.pid, number)

    def _kill(self) -> None:
        """Leave nothing behind: neither processes, nor what they have started."""
        self._look()
        found: set[psutil.Process] = set()
        for pid in (self.agent.pid, *(note.pid for note in self._running())):
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(pid)
                found |= {root, *root.children(recursive=True)}
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.agent.wait()

    def outcome(self) -> Outcome:
        self._read_notes()
        exits, problem = self.directory.exits()
        notes = sorted(self.notes.values(), key=lambda note: note.rank)
        agent_code = 0 if self.is_done and self.agent.returncode < 0 else self.agent.returncode
        outcome = account(notes, exits, self.gone, problem, agent_code, self.asked)
        return outcome._replace(main_pid=next((note.pid for note in notes if note.rank == 0), None))


def account(
    notes: Sequence[Note],
    exits: Sequence[Exit],
    gone: Mapping[int, float],
    problem: str,
    agent_code: int,
    stop_signal: int,
) -> Outcome:
    """How a launch has ended.

    `agent_code`: of the launcher underneath, which says `exits` and `problem`. `gone`: rank -> when it was seen to have
    ended without a word.
    """
    host = socket.gethostname()
    codes = {one.rank: one.code for one in exits}
    begun = {note.rank for note in notes}
    spoken = sorted((note for note in notes if note.code), key=lambda note: note.ended_at)
    first = min([*(note.ended_at for note in spoken), *gone.values()], default=math.inf)
    silent = sorted(note.rank for note in notes if note.code is None)
    # Those that ended later were told to, by the launcher underneath or by this one; as were those that it has sent
    # SIGTERM at once, while they were still importing and could say nothing.
    ended = [rank for rank in silent if codes.get(rank) == -signal.SIGTERM and gone.get(rank, 0) > first]
    died = [r for r in silent if r in gone and gone[r] <= first + TOGETHER_SECONDS and r not in ended]
    cut_off = [rank for rank in silent if rank not in died]
    lines = [f"{_ranks(cut_off)} had to be ended"] if cut_off else []
    lines += [f"{_ranks([note.rank for note in group])}: {text}" for text, group in _grouped(reversed(spoken))]
    lines += [f"{_ranks([rank])} {_how(codes.get(rank))}" for rank in died]
    unheard = [one for one in exits if one.rank not in begun and not (spoken and one.code == -signal.SIGTERM)]
    lines += [f"{_ranks([one.rank])} {_how(one.code)}" for one in unheard]
    if agent_code < 0 and not died:
        lines.append(f"the launcher of the processes was killed by {_signal(-agent_code)}")
    elif agent_code and not lines:
        lines.append(f"nothing was started: {problem or f'accelerate launch has ended with {agent_code}'}")
    in_order = agent_code >= 0 and not died and not cut_off and all(note.code != 1 for note in spoken)
    if died:
        code = 1
    elif spoken:
        code = spoken[0].code or 1
    elif agent_code or cut_off:
        code, in_order = 128 + stop_signal if stop_signal else 1, False
    else:
        code = 0
    return Outcome(code, in_order, [f"[{host}] {line}" for line in lines])


def _grouped(notes: "Iterator[Note]") -> list[tuple[str, list[Note]]]:
    groups: dict[str, list[Note]] = {}
    for note in notes:
        groups.setdefault(note.message or f"ended with exit code {note.code}", []).append(note)
    return list(groups.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {listing(sorted(ranks), 8)}"


def _how(code: int | None) -> str:
    if code is None:
        return "ended without a message"
    if code >= 0:
        return f"ended with exit code {code} without a message; see above"
    guesses: dict[int, str] = {
        signal.SIGKILL: " (by hand, or by the system because the host's memory ran out: see dmesg)",
        signal.SIGBUS: " (shared memory ran out? see df /dev/shm)",
    }
    return f"was killed by {_signal(-code)}{guesses.get(-code, '')}"


def _signal(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
