"""The run directory: what a run leaves for people and scripts, and how it ended."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from qa_dist.errors import UserError

State = Literal["running", "completed", "stopped", "failed"]

OWN_FILES = ("status.json", "config.yaml", "metrics.jsonl", "metrics.json", "predictions.json", "model")
"""Names whose presence shows that a directory is in use."""


class StoppedError(Exception):
    """The run ends early because it was asked to."""

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason)
        self.exit_code = exit_code


def require_free(path: Path) -> None:
    """Raise `UserError` if `path` holds what a new run would overwrite.

    A run that failed before its first step has left nothing of value: its directory is free.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"run.output_dir: {path} is a file; name a directory")
    in_use = [name for name in OWN_FILES if (path / name).exists()]
    if not in_use:
        return
    status = read_status(path)
    if status.get("state") == "failed" and status.get("step") == 0 and "model" not in in_use:
        return
    state = f" ({status['state']} at step {status['step']})" if {"state", "step"} <= status.keys() else ""
    raise UserError(
        f"run.output_dir: {path} holds another run{state}, and nothing is overwritten: set --run.output_dir to "
        "another directory, or move that one away"
    )


def read_status(path: Path) -> dict[str, Any]:
    """The content of a run's status.json; empty if there is none that can be read."""
    try:
        status = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


class RunDirectory:
    """The directory of this run. On all but the main process every method does nothing."""

    def __init__(self, path: Path, is_main: bool):
        self.path = path
        self.is_main = is_main
        self.step = 0
        """Optimizer steps done; part of the status."""

    @contextlib.contextmanager
    def recorded(self, config_yaml: str) -> Iterator[None]:
        """Around the whole run: write the config, and keep status.json true to how the run ends."""
        if self.is_main:
            require_free(self.path)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                (self.path / "metrics.jsonl").unlink(missing_ok=True)
                self.write("config.yaml", config_yaml)
            except OSError as error:
                raise UserError(f"run.output_dir: {self.path} cannot be written: {error.strerror}") from None
        self._status("running", "", None)
        try:
            yield
        except StoppedError as stop:
            self._status("stopped", str(stop), stop.exit_code)
            raise
        except UserError as error:
            self._status("failed", str(error), error.exit_code)
            raise
        except BaseException as error:
            self._status("failed", f"{type(error).__name__}: {error}", 1)
            raise
        self._status("completed", "", 0)

    def _status(self, state: State, reason: str, exit_code: int | None) -> None:
        content = {"state": state, "reason": reason, "step": self.step, "exit_code": exit_code}
        self.write_json("status.json", content | {"pid": os.getpid()})

    def write_json(self, name: str, content: Any) -> None:
        self.write(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

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
                file.write(json.dumps(values) + "\n")
