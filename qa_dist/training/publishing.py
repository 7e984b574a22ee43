"""A run's part on the Hub: what is pushed when, and how that has ended."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] -- documented

from qa_dist.checkpoint.hub import Repository
from qa_dist.checkpoint.manifest import NAME as MANIFEST
from qa_dist.checkpoint.manifest import Manifest
from qa_dist.checkpoint.publication import Identity, Publication
from qa_dist.checkpoint.push_queue import Event, Lane, Push, PushQueue, Summary
from qa_dist.config import HubConfig
from qa_dist.reporting.model_card import CURVES, base_model, curves, model_card
from qa_dist.reporting.run_directory import RunDirectory
from qa_dist.training.node_uploads import NodeUploads

DIRECTORY = ".hub"
"""Where files lie in a run directory until they are pushed: copies, which are links as far as the disk has them."""
STORY = ("config.yaml", "environment.json", "metrics.json", "metrics.jsonl", "status.json")
"""What the model card tells of."""
SHOWN = ("metrics.json", "predictions_summary.json")
"""What is pushed beside the model as it is."""
STOPPED_SECONDS = 10.0
"""How long a run that was asked to stop waits for the Hub: a batch system kills it soon after."""


@dataclass
class Due:
    """When the next push of a lane is due."""

    count: int
    unit: str
    _step: int = -1
    _epoch: int = -1
    _time: float = 0.0
    _offers: int = 0

    def is_due(self, step: int, epoch: int) -> bool:
        """Whether what there is now is pushed; the first is."""
        self._offers += 1
        passed = {
            "checkpoint": self._offers,
            "step": step - self._step,
            "epoch": epoch - self._epoch,
            "minute": (time.monotonic() - self._time) / 60,
        }
        due = self._step < 0 or (self.unit in passed and passed[self.unit] >= self.count)
        if due:
            self._step, self._epoch, self._time, self._offers = step, epoch, time.monotonic(), 0
        return due


class Publisher:
    """Pushes what a run leaves: on the main process all, and where nodes have disks of their own, on one process of
    each other node the shards that lie there. Elsewhere, and without a repository, every method does nothing."""

    def __init__(self, hub: HubConfig, run: RunDirectory, identity: Identity | None, store: Store | None = None):
        """`identity` is the main process's; `store` is there where the run is on several nodes."""
        self.hub = hub
        self.run = run
        self.is_main = identity is not None
        self._staged = 0
        self._unpushed: dict[Lane, Callable[[], None]] = {}
        """What a lane has newer than was submitted."""
        count, unit = hub.interval
        if unit == "minute" and not self.is_main:  # nodes have other clocks; what the main process wants must be there
            count, unit = 1, "checkpoint"
        self._due: dict[Lane, Due] = {"state": Due(count, unit), "model": Due(count, unit)}
        self._told: dict[str, str] = {}
        self.queue: PushQueue | None = None
        if run.is_main:  # of a run that was killed
            shutil.rmtree(run.path / DIRECTORY, ignore_errors=True)
        if hub.repo_id is None:
            return
        repository = Repository(hub.repo_id)
        self.uploads = NodeUploads(store, repository) if store is not None else None
        if identity is not None:
            self.publication = Publication(repository, identity, hub.branch, hub.keep, hub.keep_models)
            if self.uploads is not None:
                self.publication.wait_for_shards = self.uploads.wait_for
            self.queue = PushQueue(self.publication.push)

    @property
    def status(self) -> str:
        """A few words for the progress line."""
        status = self.queue.status if self.queue else ""
        return f"hub: {status}" if status else ""

    def offer_state(self, directory: Path, manifest: Manifest) -> None:
        """A checkpoint is complete: push it, if it is time. Called while it cannot be removed, on every process whose
        disk has one: the main process, and where nodes have disks of their own, one of each."""
        if self.hub.repo_id is None:
            return
        if self.queue is None and self.uploads is not None:
            shutil.rmtree(self.run.path / DIRECTORY, ignore_errors=True)
            self.queue = PushQueue(self.uploads.upload)
        if self.queue is not None:
            self._offer("state", manifest.step, manifest.epoch, lambda: self._submit_state(directory, manifest))

    def pass_over_state(self, manifest: Manifest) -> None:
        """The main process pushes this state without us; keep in step with it."""
        self._due["state"].is_due(manifest.step, manifest.epoch)

    def offer_model(self, step: int, epoch: int) -> None:
        """model/ and the files of its evaluation are those of `step`: push them, if it is time."""
        if self.queue is not None and self.is_main:
            self._offer("model", step, epoch, lambda: self._submit_model(step))

    def _offer(self, lane: Lane, step: int, epoch: int, submit: Callable[[], None]) -> None:
        if self._due[lane].is_due(step, epoch):
            self._unpushed.pop(lane, None)
            submit()
        else:
            self._unpushed[lane] = submit

    def _submit_state(self, directory: Path, manifest: Manifest) -> None:
        def stage(target: Path) -> None:
            for name in [MANIFEST, *manifest.files]:
                if (directory / name).is_file():  # else it is on another node's disk
                    _link(directory / name, target / name)

        self._submit("state", manifest.step, stage)

    def _submit_model(self, step: int) -> None:
        def stage(target: Path) -> None:
            files, story = target / "files", target / "story"
            files.mkdir()
            story.mkdir()
            for path in (self.run.path / "model").iterdir():
                if path.is_file():
                    _link(path, files / path.name)
            for name in SHOWN:
                _copy_if_there(self.run.path / name, files / name)
            for name in STORY:
                _copy_if_there(self.run.path / name, story / name)

        self._submit("model", step, stage)

    def _submit(self, lane: Lane, step: int, stage: Callable[[Path], None]) -> None:
        """Put the files where nobody changes or removes them, and have them pushed."""
        assert self.queue is not None
        self._staged += 1
        target = self.run.path / DIRECTORY / f"{lane}-{self._staged}"
        push = Push(lane, step, target, self._complete_model if lane == "model" else None)
        try:
            target.mkdir(parents=True)
            stage(target)
        except OSError as error:
            self.queue.give_up(push, f"{error.filename or target}: {error.strerror or error}")
        else:
            self.queue.submit(push)

    def _complete_model(self, directory: Path) -> Path:
        """Add what takes a while to make, in the worker thread. Returns the directory that holds what is pushed."""
        files, story = directory / "files", directory / "story"
        logs = self.run.path / "tensorboard"
        for path in logs.rglob("*") if logs.is_dir() else ():
            if path.is_file():
                target = files / "tensorboard" / path.relative_to(logs)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        try:
            self._add_card(story, files)
        except Exception as error:  # a card that cannot be made must not keep the model back
            self.publication.notes.append(f"hub: the model card could not be made: {type(error).__name__}: {error}")
        return files

    def _add_card(self, story: Path, files: Path) -> None:
        assert self.hub.repo_id is not None
        image = curves(story)
        if image is not None:
            _write(files / CURVES, image)
        card = model_card(story, self.hub.repo_id, license=self.hub.license or _license_of(base_model(story)))
        _write(files / "README.md", card.encode())

    # ------------------------------------------------------------------------------------- how it goes

    def events(self) -> list[Event]:
        """What has happened since the last call; of one push that is tried again and again, only what is new."""
        if self.queue is None or not self.is_main:
            return []
        found = []
        for event in self.queue.events():
            if event.what != "retrying" or self._told.get(event.push.name) != event.reason:
                found.append(event)
            self._told[event.push.name] = event.reason
        return found

    def notes(self) -> list[str]:
        """Remarks for the user since the last call."""
        if self.queue is None or not self.is_main:
            return []
        notes, self.publication.notes = self.publication.notes, []
        return notes

    def finish(self, seconds: float, give_up: Callable[[], bool], tell: Callable[[], None]) -> Summary | None:
        """Push what is left, and wait for it: at most so long, and until `give_up`. `tell` is called now and then.
        None where nothing is pushed at all."""
        for submit in self._unpushed.values():
            submit()
        self._unpushed = {}
        if self.queue is None or not self.is_main:
            return None
        summary = self.queue.drain(seconds, give_up, tell)
        shutil.rmtree(self.run.path / DIRECTORY, ignore_errors=True)
        self.run.hub = {
            "repo_id": self.hub.repo_id,
            "pushed": summary.pushed,
            "superseded": summary.superseded,
            "failed": summary.failed,
            "missing": summary.missing,
        }
        return summary

    def close(self) -> None:
        """Push nothing more, also where a run ends without `finish`."""
        if self.queue is not None:
            self.queue.close()


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write(target: Path, content: bytes) -> None:
    """Not into what is a link to somebody's file."""
    target.unlink(missing_ok=True)
    target.write_bytes(content)


def _copy_if_there(source: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        _write(target, source.read_bytes())


def _license_of(base: str | None) -> str | None:
    """What the Hub says of the model that training started from."""
    if base is None:
        return None
    with contextlib.suppress(Exception):  # not known, then
        card = HfApi().model_info(base, timeout=30).card_data
        return str(card["license"]) if card is not None and card.get("license") else None
    return None
