"""status.json, as those read it who have not written it."""

import json
import socket
from pathlib import Path
from typing import Any

from qa_dist.launch_directory import is_running


def read_status(path: Path) -> dict[str, Any]:
    """The content of a run's status.json; empty if there is none that can be read."""
    try:
        status = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def is_gone(status: dict[str, Any]) -> bool:
    """Whether the process that wrote `status` is known to have ended: only on its own host can one tell."""
    if status.get("host") != socket.gethostname() or not isinstance(status.get("pid"), int):
        return False
    return not is_running(status["pid"])
