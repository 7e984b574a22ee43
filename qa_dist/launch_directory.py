"""What the launcher of one machine and the processes that it has started tell each other: small files in a directory
that is theirs alone.

Signals alone do not do: batch systems send them to whom they please, launchers in between die of them or add
deadlines of their own, and a process that was killed says nothing.
"""

import json
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "QA_DIST_LAUNCH_DIRECTORY"
LAUNCHER = "QA_DIST_LAUNCHER_PID"
EXPECTED_WORLD = "QA_DIST_WORLD_SIZE"
"""Environment variables of the processes: the directory, the launcher's process id, how many they should be."""


@dataclass(frozen=True)
class Note:
    """What a process has said of itself."""

    rank: int
    pid: int
    host: str
    code: int | None = None
    """Exit code; None while it runs, and for ever if it was killed."""
    message: str = ""
    ended_at: float = 0.0


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
        rank = int(os.environ.get("RANK", "0"))
        ended_at = 0.0 if code is None else time.time()
        note = Note(rank, os.getpid(), socket.gethostname(), code, message, ended_at)
        self._write(f"rank_{rank:05}.json", asdict(note))

    def stop_signal(self) -> int:
        """The signal because of which this process should stop, or 0."""
        number = _read(self.path / "stop.json").get("signal", 0)
        launcher = os.environ.get(LAUNCHER)
        if not number and launcher and not is_running(int(launcher)):
            return signal.SIGHUP  # nobody is left who would end this process
        return number

    def _write(self, name: str, content: dict[str, Any]) -> None:
        temporary = self.path / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self.path / name)
        except OSError:
            pass  # a full or vanished /tmp: the launcher then says less, and nothing else is lost


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


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is more than an entry that its parent has not read yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
