"""What the launcher of one machine and the processes that it has started tell each other: small files in a directory
that is theirs alone.

Signals alone do not do: batch systems send them to whom they please, launchers in between die of them or add
deadlines of their own, and a process that was killed says nothing.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

VARIABLE = "QA_DIST_LAUNCH_DIRECTORY"
LAUNCHER = "QA_DIST_LAUNCHER"
EXPECTED_WORLD = "QA_DIST_WORLD_SIZE"
"""Environment variables of the processes: the directory, the launcher's identity, how many they should be."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Those that ask for a stop with a checkpoint."""
ECHO_SECONDS = 5.0
"""Signals this soon after the first are the same request again: batch systems send them to several processes, which
pass them on."""
ORPHANED_SECONDS = 100.0
"""How long processes whose launcher was killed have to stop with a checkpoint."""


@dataclass(frozen=True)
class Note:
    """What a process has said of itself."""

    rank: int
    pid: int
    started: str
    """When the process began: numbers of processes are used again."""
    host: str
    code: int | None = None
    """Exit code; None while it runs, and for ever if it was killed."""
    message: str = ""
    ended_at: float = 0.0

    @property
    def is_running(self) -> bool:
        return is_running(self.pid, self.started)


@dataclass(frozen=True)
class Exit:
    """A process that the launcher underneath has seen fail."""

    rank: int
    pid: int
    code: int
    """Negative: killed by that signal."""


class LaunchDirectory:
    """One launch on one machine."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def of_this_process(cls) -> "LaunchDirectory | None":
        """None for a process that was started without `qa-dist launch`."""
        path = os.environ.get(VARIABLE)
        return cls(Path(path)) if path else None

    # -------------------------------------------------------------------------------- the launcher's side

    def environment(self) -> dict[str, str]:
        """By which the processes know this directory, and the launcher: this process."""
        return {VARIABLE: str(self.path), LAUNCHER: f"{os.getpid()}@{start_of(os.getpid())}"}

    def ask_to_stop(self, number: int) -> None:
        """Ask all processes to stop because signal `number` came."""
        self._write("stop.json", {"signal": number})

    def notes(self) -> list[Note]:
        """What the processes have said, by rank."""
        found = [_read(path) for path in self.path.glob("rank_*.json")]
        return sorted((Note(**content) for content in found if content), key=lambda note: note.rank)

    def write_exits(self, exits: list[Exit], problem: str = "") -> None:
        """What the launcher underneath knows of processes that failed, the first one first, or why it started none."""
        self._write("exits.json", {"exits": [asdict(one) for one in exits], "problem": problem})

    def exits(self) -> tuple[list[Exit], str]:
        content = _read(self.path / "exits.json")
        return [Exit(**one) for one in content.get("exits", [])], content.get("problem", "")

    # ------------------------------------------------------------------------------- the processes' side

    def note(self, code: int | None = None, message: str = "") -> None:
        """Say that this process has begun, or how it ends."""
        rank, pid = int(os.environ.get("RANK", "0")), os.getpid()
        ended_at = 0.0 if code is None else time.time()
        note = Note(rank, pid, start_of(pid), socket.gethostname(), code, message, ended_at)
        self._write(f"rank_{rank:05}.json", asdict(note))

    def stop_signal(self) -> int:
        """The signal because of which this process should stop, or 0."""
        if number := _read(self.path / "stop.json").get("signal", 0):
            return number
        return 0 if launcher_is_there() else signal.SIGHUP  # nobody is left who would end this process

    def _write(self, name: str, content: dict[str, Any]) -> None:
        temporary = self.path / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self.path / name)
        except OSError:
            pass  # a full or vanished /tmp: there are signals too, and the launcher knows its children


def launcher_is_there() -> bool:
    """Whether `qa-dist launch`, which has started this process, still runs."""
    pid, _, started = os.environ.get(LAUNCHER, "").partition("@")
    return not pid or is_running(int(pid), started)


def when_orphaned(end: Callable[[], object], seconds: float = ORPHANED_SECONDS) -> None:
    """Call `end`, in a thread, so long after the launcher was killed: a process that cannot stop by itself, because it
    hangs or has not begun to listen, is not to live on without anybody who knows of it."""

    def look() -> None:
        while launcher_is_there():
            time.sleep(2)
        time.sleep(seconds)
        end()

    threading.Thread(target=look, name="launcher", daemon=True).start()


def conclude(code: int, message: str) -> None:
    """Leave word of how this process ends, if there is a launcher that asks for it. The first word stands."""
    directory = LaunchDirectory.of_this_process()
    if directory is not None and not any(n.pid == os.getpid() and n.code is not None for n in directory.notes()):
        directory.note(code, message)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def start_of(pid: int) -> str:
    """When a process began, on the machine's own clock; empty if there is none. Clocks that people read are set."""
    if fields := _stat(pid):
        return fields[19]
    try:
        return str(psutil.Process(pid).create_time())  # without /proc the system tells it as it was
    except psutil.Error:
        return ""


def is_running(pid: int, started: str = "") -> bool:
    """Whether there is such a process, begun then if that is known, and more than an entry for its parent to read."""
    fields = _stat(pid)
    if fields and fields[0] in "ZX":
        return False
    if not fields and not psutil.pid_exists(pid):
        return False
    return not started or start_of(pid) == started


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on, the state; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
