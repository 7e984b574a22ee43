"""Checkpoints written in the background: the training thread waits for the copy to host memory, and no longer."""

import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from qa_dist.checkpoint.manifest import File, Manifest
from qa_dist.checkpoint.state import non_finite
from qa_dist.checkpoint.store import (
    add_files,
    directory_name,
    put_in_place,
    shard_name,
    thin_out,
    write_manifest,
    write_shard,
)
from qa_dist.errors import listing

Exchange = Callable[[Any], list[Any]]
"""Every rank's value, by rank, on all of them; over connections that the training thread does not use."""


class NonFiniteStateError(Exception):
    """The weights or moments of a run hold a NaN or an infinity, so that nothing could be trained from them."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept."""

    keep_last: int
    keep_best: int


class CheckpointWriter:
    """One process's part in writing checkpoints. At most one is being written; the next one waits for it.

    All ranks write their shards into a temporary directory; when all are on the disk the manifest is written, the
    directory renamed, and only then are older ones removed. Where nodes have disks of their own, each keeps its
    processes' shards and a manifest of all.
    """

    def __init__(
        self,
        root: Path,
        rank: int,
        world_size: int,
        *,
        is_local_main: bool,
        exchange: Exchange,
        retention: Retention,
        companions: Callable[[Path], object] = lambda directory: None,
        published: Callable[[Path, Manifest], object] = lambda directory, manifest: None,
    ):
        """`companions` puts what belongs to the weights into a directory, as flat files; on the main process.
        `published` is told of every checkpoint that this process's disk holds now, before older ones are removed."""
        self.root = root
        self.rank = rank
        self.world_size = world_size
        self.is_local_main = is_local_main
        self.exchange = exchange
        self.retention = retention
        self.companions = companions
        self.published = published
        self.problem: str | None = None
        """Why the last checkpoint could not be written; None if it was."""
        self._news: list[str] = []
        self._not_removed: set[str] = set()
        """Directories of old checkpoints that could not be removed, of which the user was warned."""
        self._thread: threading.Thread | None = None

    def submit(self, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        """Start to write `tensors`, which must not change until `wait` returns. `manifest` has no files yet."""
        self.wait()
        name = f"checkpoint-{manifest.step}"
        self._thread = threading.Thread(target=self._write, args=(tensors, manifest), name=name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def news(self) -> list[str]:
        """What has happened since the last call, for the user."""
        news, self._news = self._news, []
        return news

    def _write(self, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        target = self.root / directory_name(manifest.step)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            problems = self._publish(tensors, manifest, temporary, target)
        except Exception as error:  # the other processes are gone, or there is a bug
            problems = [f"{type(error).__name__}: {error}"]
        if problems:
            shutil.rmtree(temporary, ignore_errors=True)
            self.problem = f"the checkpoint of step {manifest.step} could not be written: {problems[0]}"
            self._news.append(f"{self.problem}. The next one will be tried")
        else:
            self.problem = None

    def _publish(self, tensors: dict[str, Tensor], manifest: Manifest, temporary: Path, target: Path) -> list[str]:
        """Returns the problems of all ranks; all get the same answer."""

        def clear() -> None:
            if bad := non_finite(tensors):
                names = listing([name.partition(":")[0] for name in bad], 3)
                raise NonFiniteStateError(
                    f"{names} on rank {self.rank}: not finite (NaN or infinity); older ones are kept"
                )
            if self.is_local_main:
                shutil.rmtree(temporary, ignore_errors=True)

        def prepare() -> str | None:
            if self.is_local_main:
                temporary.mkdir(parents=True, exist_ok=True)  # several nodes may share it
            if self.rank > 0:
                return None
            with tempfile.NamedTemporaryFile(dir=temporary, prefix=".first-", delete=False) as marker:
                return marker.name

        def write() -> dict[str, File]:
            written: dict[str, File] = {}
            if tensors:
                name = shard_name(self.rank, self.world_size)
                written[name] = write_shard(temporary, name, tensors)
            if self.rank == 0:
                written |= add_files(temporary, self.companions)
            return written

        _, problems = self._all(clear)
        markers, more = self._all(prepare)
        if problems or more:
            return [*problems, *more]
        # Where the main process's file is not to be seen, the disk is another one.
        marker = temporary / Path(markers[0]).name
        elsewhere, problems = self._all(lambda: self.is_local_main and marker not in set(temporary.iterdir()))
        if problems:
            return problems
        keeps_own = self.rank == 0 or elsewhere[self.rank]
        shards, problems = self._all(write)
        if problems:
            return problems
        (first, *_), _ = self._all(lambda: manifest if self.rank == 0 else None)
        whole = first.model_copy(update={"files": {name: file for written in shards for name, file in written.items()}})

        def finish() -> None:
            if keeps_own:
                for marker in temporary.glob(".first-*"):
                    marker.unlink()
                write_manifest(temporary, whole)
                put_in_place(temporary, target)
                self.published(target, whole)

        _, problems = self._all(finish)
        if problems:
            return problems

        self._thin_out(manifest.step if keeps_own else None)
        return []

    def _thin_out(self, step: int | None) -> None:
        """Remove older checkpoints than that of `step`, on the ranks that keep one. The new one is complete, whatever
        happens to them."""

        def thin() -> list[tuple[str, str]]:
            if step is None:
                return []
            left = thin_out(self.root, self.retention.keep_last, self.retention.keep_best, {step})
            return [(str(path), reason) for path, reason in left.items()]

        left, problems = self._all(thin)
        for path, reason in [*chain.from_iterable(filter(None, left)), *((str(self.root), p) for p in problems)]:
            self._warn_of(path, reason)

    def _warn_of(self, path: str, reason: str) -> None:
        """Report an old checkpoint that could not be removed, each directory once."""
        if path not in self._not_removed:
            self._not_removed.add(path)
            self._news.append(f"warning: the old checkpoint in {path} could not be removed: {reason}")

    def _all(self, action: Callable[[], Any]) -> tuple[list[Any], list[str]]:
        """Do `action` on all ranks. Returns their results, and the problems of any."""
        result, problem = None, None
        try:
            result = action()
        except OSError as error:
            problem = f"{error.filename or self.root}: {error.strerror or error}"
        except NonFiniteStateError as error:
            problem = str(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        answers = self.exchange((result, problem))
        return [answer[0] for answer in answers], [answer[1] for answer in answers if answer[1] is not None]
