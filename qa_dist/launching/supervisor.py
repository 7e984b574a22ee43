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

from qa_dist.errors import listing
from qa_dist.launch_directory import LAUNCHER, VARIABLE, Exit, LaunchDirectory, Note, is_running
from qa_dist.launching.agent import STOP_SIGNALS

ECHO_SECONDS = 5.0
"""Signals this soon after the first are the same request again: batch systems send several."""
POLL_SECONDS = 0.2
ORPHAN_SECONDS = 40.0
"""How long processes whose launcher underneath is gone have to end with a checkpoint."""
TOGETHER_SECONDS = 5.0
"""Processes that end so soon after each other do so by themselves, not because the launcher underneath has them end."""
AT_ONCE_SECONDS = 5.0
"""How long after a second signal."""


def supervise(arguments: Sequence[str], environment: Mapping[str, str], say: Callable[[str], object]) -> int:
    """Run `accelerate launch` with `arguments` until all its processes have ended. Returns the exit code: theirs.

    A signal asks them to stop: they end after the step they are in, with a checkpoint. A second one, after
    `ECHO_SECONDS`, ends them at once.
    """
    path = Path(tempfile.mkdtemp(prefix="qa_dist_launch_"))
    directory = LaunchDirectory(path)
    own = {VARIABLE: str(path), LAUNCHER: str(os.getpid())}
    command = [sys.executable, "-m", "qa_dist.launching.agent", *arguments]
    try:
        with _Signals(directory) as signals:
            # In a session of its own, so that Ctrl-C reaches this process alone.
            agent = subprocess.Popen(command, env={**os.environ, **environment, **own}, start_new_session=True)
            try:
                gone = _watch(agent, directory, signals, say)
            finally:
                _kill(agent, directory)
        exits, problem = directory.exits()
        lines, code = account(directory.notes(), exits, gone, problem, agent.returncode, signals.first)
        for line in lines:
            say(line)
        return code
    finally:
        shutil.rmtree(path, ignore_errors=True)


class _Signals:
    """The first signal that asked for a stop, which is passed on, and whether there was a later one."""

    first = 0
    again = False
    _at = 0.0

    def __init__(self, directory: LaunchDirectory):
        self.directory = directory

    def __enter__(self) -> "_Signals":
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.first:
            self.first, self._at = number, time.monotonic()
            self.directory.ask_to_stop(number)  # for those that do not listen to signals yet
            _send(number, self.directory)
        elif time.monotonic() - self._at > ECHO_SECONDS:
            self.again = True


def _watch(
    agent: "subprocess.Popen[bytes]", directory: LaunchDirectory, signals: _Signals, say: Callable[[str], object]
) -> dict[int, float]:
    """Return when the launcher underneath and all its processes have ended, or have to be killed: with the ranks that
    have ended without a word, and when that was seen."""
    gone: dict[int, float] = {}
    asked = False
    deadline = float("inf")
    while agent.poll() is None or _running(directory):
        for note in directory.notes():
            if note.code is None and not is_running(note.pid):
                gone.setdefault(note.rank, time.time())
        if signals.first and not asked:
            asked = True
            say(f"{signal.Signals(signals.first).name}: stopping after the step that is being done, with a checkpoint")
        if signals.again and deadline == float("inf"):
            say("stopping at once")
            _send(signal.SIGTERM, directory)
            deadline = time.monotonic() + AT_ONCE_SECONDS
        if agent.returncode is not None and deadline == float("inf"):
            # Killed, or at its end a moment before the processes. They are not left to train unwatched.
            directory.ask_to_stop(signals.first or signal.SIGTERM)
            deadline = time.monotonic() + ORPHAN_SECONDS
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return gone


def _running(directory: LaunchDirectory) -> list[Note]:
    return [note for note in directory.notes() if is_running(note.pid)]


def _send(number: int, directory: LaunchDirectory) -> None:
    for note in _running(directory):
        with contextlib.suppress(OSError):
            os.kill(note.pid, number)


def _kill(agent: "subprocess.Popen[bytes]", directory: LaunchDirectory) -> None:
    """Leave nothing behind."""
    _send(signal.SIGKILL, directory)
    if agent.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()


def account(
    notes: Sequence[Note],
    exits: Sequence[Exit],
    gone: Mapping[int, float],
    problem: str,
    agent_code: int,
    stop_signal: int,
) -> tuple[list[str], int]:
    """How a launch has ended: lines for people, the cause last, and the exit code.

    `agent_code`: of the launcher underneath, which says `exits` and `problem`. `gone`: rank -> when it was seen to have
    ended without a word.
    """
    host = socket.gethostname()
    codes = {one.rank: one.code for one in exits}
    begun = {note.rank for note in notes}
    spoken = sorted((note for note in notes if note.code), key=lambda note: note.ended_at)
    first = min([*(note.ended_at for note in spoken), *gone.values()], default=math.inf)
    silent = sorted(note.rank for note in notes if note.code is None)
    # Those that ended later were told to, by the launcher underneath or by this one.
    died = [rank for rank in silent if rank in gone and gone[rank] <= first + TOGETHER_SECONDS]
    cut_off = [rank for rank in silent if rank not in died]
    lines = [f"{_ranks(cut_off)} had to be ended"] if cut_off else []
    lines += [f"{_ranks([note.rank for note in group])}: {text}" for text, group in _grouped(reversed(spoken))]
    lines += [f"{_ranks([rank])} {_how(codes.get(rank))}" for rank in died]
    lines += [f"{_ranks([one.rank])} {_how(one.code)}" for one in exits if one.rank not in begun]
    if agent_code < 0 and not spoken and not died:
        lines.append(f"the launcher of the processes was killed by {_signal(-agent_code)}")
    elif agent_code and not lines:
        lines.append(f"nothing was started: {problem or f'accelerate launch has ended with {agent_code}'}")
    if died:
        code = 1
    elif spoken:
        code = spoken[0].code or 1
    elif agent_code or cut_off:
        code = 128 + stop_signal if stop_signal else 1
    else:
        code = 0
    return [f"[{host}] {line}" for line in lines], code


def _grouped(notes: "Iterator[Note]") -> list[tuple[str, list[Note]]]:
    groups: dict[str, list[Note]] = {}
    for note in notes:
        groups.setdefault(note.message or f"ended with exit code {note.code}", []).append(note)
    return list(groups.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {listing(sorted(ranks), 8)}"


def _how(code: int | None) -> str:
    if code is None:
        return "ended without a word"
    if code >= 0:
        return f"ended with exit code {code} before it could say why; see above"
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
