"""The run directory: what a run leaves for people and scripts, and how it ended."""

import contextlib
import json
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from qa_dist.errors import NotPushedError, UserError
from qa_dist.reporting.batch_job import BatchJob
from qa_dist.reporting.environment import environment
from qa_dist.reporting.run_lock import LOCK, Claim, claim
from qa_dist.reporting.status import is_gone, read_status

METRICS = "metrics.jsonl"
LIFE_SECONDS = 5.0
"""How often status.json says that the run goes on, and how far it is."""
State = Literal["running", "completed", "stopped", "failed"]

FIRST_FILES = ("status.json", "config.yaml", "environment.json")
"""What a run writes before anything that costs time to make."""
OWN_FILES = ("status.json", "config.yaml", "metrics.jsonl", "metrics.json", "predictions.json", "model", "checkpoints")
"""Names whose presence shows that a directory is in use."""


class StoppedError(Exception):
    """The run ends early because it was asked to."""

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason)
        self.exit_code = exit_code


def require_free(path: Path, *, may_go_on: bool = True, what: str = "another run") -> None:
    """Raise `UserError` if `path` holds what a new run would overwrite; the message calls it `what`, and says how to go
    on with it, where that may be done.

    A run that failed, was stopped or was killed before its first step has left nothing of value: its directory is free.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"run.output_dir: {path} is a file; name a directory")
    in_use = [name for name in OWN_FILES if (path / name).exists()]
    if "checkpoints" in in_use and not any((path / "checkpoints").glob("step_*")):  # one was about to be fetched
        in_use.remove("checkpoints")
    if not in_use:
        return
    status = read_status(path)
    ended = status.get("state") in ("failed", "stopped") or (status.get("state") == "running" and is_gone(status))
    if ended and status.get("step") == 0 and "model" not in in_use and not _has_trained(path):
        return
    step = f" at step {status['step']}" if status.get("step") else ""
    state = f" ({status['state']}{step})" if {"state", "step"} <= status.keys() else ""
    go_on = "resume it (--resume auto), " if may_go_on else ""
    raise UserError(
        f"run.output_dir: {path} holds {what}{state}, and nothing is overwritten: {go_on}set --run.output_dir to "
        "another directory, or move that one away"
    )


def _has_trained(path: Path) -> bool:
    """Whether a run has left checkpoints or logged steps, whatever its status says: that of a killed one is old."""
    if any((path / "checkpoints").glob("step_*")):
        return True
    metrics = path / "metrics.jsonl"
    return metrics.is_file() and b'"kind": "train"' in metrics.read_bytes()


class RunDirectory:
    """The directory of this run. On all but the main process every method does nothing."""

    def __init__(self, path: Path, is_main: bool):
        self.path = path
        self.is_main = is_main
        self.step = 0
        """Optimizer steps done; part of the status."""
        self.id = ""
        """Of the run: the same from its first start to its end, on whatever machines."""
        self.hub: dict[str, Any] | None = None
        """How its pushes have gone; part of the status."""
        self._launch = ""
        self._lock = threading.Lock()
        self._claim: Claim | None = None
        self._is_open = False
        self._has_ended = False
        self._made: list[Path] = []
        """The directories that were not there before, the run directory first."""
        self._is_refused = False

    @property
    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl; 0 on all but the main process."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if self.is_main and path.is_file() else 0

    def claim(self, say: Callable[[str], object]) -> None:
        """See to it that no other run writes here until `close`. Raises `UserError`."""
        if self.is_main:
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self._claim = claim(self.path, say)

    def close(self) -> None:
        """Let others use the directory. Remove it if nothing came into it, or if the start was refused, nothing but a
        run's first files is in it, and it was not there before."""
        if self._claim is not None:
            with contextlib.suppress(OSError):
                names = {entry.name for entry in self.path.iterdir()}
                is_left_over = self._is_refused and bool(self._made) and names <= {LOCK, *FIRST_FILES}
                if is_left_over or (not self._is_open and names == {LOCK}):
                    self._remove(names)
            self._claim.close()
            self._claim = None

    def _remove(self, names: set[str]) -> None:
        """Remove the directory with the files `names`, and those of its parents that were made for it, if empty."""
        for name in sorted(names, key=lambda name: name == LOCK):
            (self.path / name).unlink()
        for path in self._made or [self.path]:
            path.rmdir()

    def open(self, config_yaml: str, launch: str, *, is_own: bool = False, goes_on: bool = False) -> None:
        """Make the directory, write the config, and say that the run is running, and how it was launched.

        `is_own`: what is in the directory is of an earlier attempt at this run. `goes_on`: and it is still of use, so
        that nothing but the status is written until `go_on`. Raises `UserError` if the directory holds another run or
        cannot be written.
        """
        if not self.is_main:
            return
        if not is_own:
            require_free(self.path)
        self._launch = launch
        self._is_open = True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not goes_on:
                self.go_on(config_yaml, 0)
            self._status("running", "", None)
            self.write_json("environment.json", environment(launch))
        except OSError as error:
            raise UserError(f"run.output_dir: {self.path} cannot be written: {error.strerror}") from None

    def go_on(self, config_yaml: str, metrics_bytes: int, state: Path | None = None) -> None:
        """Write the config, and make metrics.jsonl what it was when `state` was written, or keep so many bytes of it:
        what comes after them is done again."""
        if not self.is_main:
            return
        path = self.path / METRICS
        if state is not None and (state / METRICS).is_file():
            temporary = self.path / f".{METRICS}.tmp"
            shutil.copyfile(state / METRICS, temporary)
            temporary.replace(path)
        elif metrics_bytes == 0:
            path.unlink(missing_ok=True)
        elif self.metrics_bytes > metrics_bytes:
            os.truncate(path, metrics_bytes)
        self.write("config.yaml", config_yaml)

    def copy_metrics(self, directory: Path, size: int) -> None:
        """Put the first `size` bytes of metrics.jsonl into `directory`."""
        if self.is_main and size:
            with (self.path / METRICS).open("rb") as file:
                (directory / METRICS).write_bytes(file.read(size))

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Around all that follows `open`: keep status.json true to how far the run is, and how it ends."""
        try:
            with self._alive():
                yield
        except StoppedError as stop:
            self._end("stopped", str(stop), stop.exit_code)
            raise
        except NotPushedError as error:
            self._end("completed", str(error), error.exit_code)
            raise
        except KeyboardInterrupt:
            self._end("stopped", "interrupted at once by a second signal", 130)
            raise
        except UserError as error:
            self._end("failed", str(error), error.exit_code)
            self._is_refused = error.exit_code == UserError.exit_code and self.step == 0
            raise
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}", 1)
            raise
        self._end("completed", "", 0)

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Keep status.json up to date from a thread, which has ended before anything is written of how the run ends."""
        if not self.is_main:
            yield
            return
        leaving = threading.Event()
        thread = threading.Thread(target=self._show_life, args=(leaving,), name="status", daemon=True)
        thread.start()
        try:
            yield
        finally:
            leaving.set()
            thread.join(timeout=2)  # it may hang in a disk of the network

    def _show_life(self, leaving: threading.Event) -> None:
        while not leaving.wait(LIFE_SECONDS):
            with contextlib.suppress(OSError):
                self._status("running", "", None)

    def fail(self, reason: str) -> None:
        """The process is about to end, from whichever thread finds that it has to."""
        self._end("failed", reason, 1)

    def _end(self, state: State, reason: str, exit_code: int) -> None:
        if not self._is_open:
            return
        try:
            self._status(state, reason, exit_code)
        except OSError:  # the error that ends the run is the one to be told, not that the disk is full for this too
            with contextlib.suppress(OSError):
                self._overwrite_status(state, reason, exit_code)

    def _overwrite_status(self, state: State, reason: str, exit_code: int) -> None:
        """Without a byte more on the disk, where there is none left; what had to be left out is in the log."""
        content = {"state": state, "reason": reason, "step": self.step, "exit_code": exit_code}
        with (self.path / "status.json").open("r+b") as file:
            room = len(file.read())
            old = read_status(self.path)
            own = {key: old[key] for key in ("job", "attempt", "run", "host", "pid") if key in old}
            for words in (reason, reason[:80], ""):
                text = json.dumps(content | {"reason": words} | own, indent=2).encode()
                if len(text) <= room:
                    file.seek(0)
                    file.write(text.ljust(room))
                    return

    def _status(self, state: State, reason: str, exit_code: int | None) -> None:
        content = {"state": state, "reason": reason, "step": self.step, "exit_code": exit_code, "updated": time.time()}
        own = {"launch": self._launch, "host": socket.gethostname(), "pid": os.getpid(), "run": self.id}
        if job := BatchJob.of_this_process():  # which attempt of it this is, its batch script wants to know
            own |= {"job": job.name, "attempt": job.attempt}
        with self._lock:
            if not self._has_ended:
                self._has_ended = exit_code is not None
                self.write_json("status.json", content | own | ({"hub": self.hub} if self.hub else {}))

    def write_json(self, name: str, content: Any) -> None:
        self.write(name, json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

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
                file.write(json.dumps(_finite(values), allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    """`content` with null for numbers that JSON does not have."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list) else content
