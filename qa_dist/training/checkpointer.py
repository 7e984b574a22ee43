"""When a checkpoint is due, and what goes into it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qa_dist.checkpoint.manifest import Manifest, Optimizer
from qa_dist.checkpoint.progress import Progress
from qa_dist.checkpoint.state import HostCopies
from qa_dist.checkpoint.writer import CheckpointWriter, Retention
from qa_dist.config import RunConfig
from qa_dist.errors import TrainingError
from qa_dist.reporting.run_directory import RunDirectory
from qa_dist.tasks.task import Task
from qa_dist.training.engine import Engine
from qa_dist.training.export import write_companions
from qa_dist.training.resume import DIRECTORY


class Digests(NamedTuple):
    """Digests of a run's data."""

    train: str
    """Of the training features."""
    validation: str | None
    """Of everything that the evaluation depends on; None where nothing is evaluated."""


class Checkpointer:
    """Takes copies of the state and has them written."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        run: RunDirectory,
        task: Task,
        digests: Digests,
        published: Callable[[Path, Manifest], object],
    ):
        """`published`: see `CheckpointWriter`."""
        self.config = config
        self.engine = engine
        self.run = run
        self.task = task
        self.digests = digests
        self.count, self.unit = config.checkpoint.interval
        self.copies = HostCopies(engine.rank, engine.world_size)
        self.writer = CheckpointWriter(
            run.path / DIRECTORY,
            engine.rank,
            engine.world_size,
            is_local_main=engine.is_local_main,
            exchange=engine.exchange,
            retention=Retention(config.checkpoint.keep_last, config.checkpoint.keep_best),
            companions=self._write_companions,
            published=published,
        )
        self.written_step: int | None = None
        """The step of the newest checkpoint of this process."""
        self._last = time.monotonic()
        self._step = 0
        """Of the checkpoint being written."""
        self._metrics_bytes = 0
        """Of metrics.jsonl, that belong to it."""

    def _write_companions(self, directory: Path) -> None:
        config = self.engine.strategy.plain_model().config
        write_companions(directory, config, self.task, self.config, {}, self._step)
        self.run.copy_metrics(directory, self._metrics_bytes)

    def is_due_after_step(self, step: int) -> bool:
        return self.unit == "step" and step % self.count == 0

    def is_due_after_epoch(self, epoch: int) -> bool:
        return self.unit == "epoch" and epoch % self.count == 0

    def is_due_by_the_clock(self) -> bool:
        """On one process: the others have other clocks."""
        return self.unit == "minute" and time.monotonic() - self._last >= 60 * self.count

    def save(self, progress: Progress, score: float | None) -> None:
        """Copy the state to host memory, and have it written. All ranks have to call it."""
        if not self.unit or progress.step == 0 or (self.written_step == progress.step and score is None):
            return
        self.writer.wait()  # the buffers may still be being written
        tensors = self.copies.capture(self.engine.strategy)
        strategy = self.engine.strategy
        self._step = progress.step
        self._metrics_bytes = self.run.metrics_bytes
        manifest = Manifest(
            step=progress.step,
            epoch=progress.epoch,
            launch=self.engine.launch,
            optimizer=Optimizer(fused=bool(strategy.optimizer.param_groups[0].get("fused"))),
            config=self.config.model_dump(mode="json"),
            data=self.digests.train,
            validation=self.digests.validation,
            progress=progress.model_copy(deep=True),  # training goes on while it is written
            run_id=self.run.id,
            loss_scale=strategy.loss_scale_state(),
            metrics_bytes=self._metrics_bytes,
            score=score,
            tensors=self.copies.specs,
            files={},
        )
        self.writer.submit(tensors, manifest)
        self.written_step = progress.step
        self._last = time.monotonic()

    def finish(self) -> None:
        """Wait until everything is written."""
        self.writer.wait()

    def news(self) -> list[str]:
        return self.writer.news()

    def raise_if_failed(self) -> None:
        """Raise `TrainingError` if the newest checkpoint could not be written."""
        if self.writer.problem is not None:
            raise TrainingError(f"training is done, but {self.writer.problem}")
