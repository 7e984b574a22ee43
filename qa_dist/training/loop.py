"""Training: epochs and steps.

`Training.fit` reads as the story of a run. Who owns what: the plan of an epoch is a pure function (`batching`), the
engine owns the model and the optimizer, the run directory owns the files, and `Progress` holds the few numbers
that change.
"""

import math
import time
from dataclasses import dataclass, field

import numpy as np

from qa_dist.checkpoint.progress import Meter, Progress
from qa_dist.checkpoint.publication import Pointer
from qa_dist.checkpoint.state import full_weights, non_finite
from qa_dist.config import RunConfig
from qa_dist.errors import NotPushedError, TrainingError, UserError, listing
from qa_dist.reporting.run_directory import RunDirectory, StoppedError
from qa_dist.reporting.tracker import Tracker
from qa_dist.tasks.task import FeatureSet, Score, Task
from qa_dist.training.batching import Indices
from qa_dist.training.checkpointer import Checkpointer, Digests
from qa_dist.training.engine import Engine
from qa_dist.training.evaluation import evaluate
from qa_dist.training.export import export_model, exported_step
from qa_dist.training.health import FlopsPerWindow, peak_flops, peak_memory
from qa_dist.training.hub_view import HubView, fetch_model
from qa_dist.training.next_steps import after_completion
from qa_dist.training.preemption import StopRequest
from qa_dist.training.prefetch import made_ahead
from qa_dist.training.publishing import STOPPED_SECONDS, Publisher
from qa_dist.training.resume import Checkpoint, load
from qa_dist.training.schedule import RunPlan
from qa_dist.training.step import NonFiniteError, Step, StepResult

MOST_WARM_UPS = 40
"""Steps after which float16's loss scale is low enough for any first step that works at all."""


@dataclass
class Training:
    """A run's epochs."""

    config: RunConfig
    engine: Engine
    task: Task
    run: RunDirectory
    tracker: Tracker
    stop: StopRequest
    sets: dict[str, FeatureSet]
    micro_batch_size: int
    flops: FlopsPerWindow | None
    digests: Digests
    publisher: Publisher
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.training_set = self.sets["train"]
        self.plan = RunPlan(self.config.train, self.training_set.lengths)
        self.total_steps = self.plan.total
        self.peak_flops = peak_flops(self.engine.device, self.engine.accelerator.mixed_precision)
        settings = self.config.train
        self.step = Step(settings, self.engine, self.task, self.training_set, self.micro_batch_size, self.stop)
        published = self.publisher.offer_state
        self.checkpointer = Checkpointer(self.config, self.engine, self.run, self.task, self.digests, published)
        self.has_model = False
        """Whether model/ here is the exported one: a run that goes on elsewhere has left it where it was."""
        self.pushed_model: Pointer | None = None
        """What the Hub had of the model when the run went on in place."""
        self.tracker.background = lambda: self.publisher.status

    def resume(self, checkpoint: Checkpoint, *, in_place: bool, compares: bool = True) -> None:
        """Go on from `checkpoint`; `in_place` says that it is the run directory's own, `compares` that its scores
        compare with later ones. Raises `UserError` for one of another model."""
        # An optimizer has no state before its first step. What this one changes is overwritten.
        first = np.argsort(self.training_set.lengths, kind="stable")[: self.engine.world_size]
        collated = self.step.collate(first)
        for _ in range(MOST_WARM_UPS):
            if not self.step.run(0, 0.0, first, collated).skipped:
                break
        load(self.engine, checkpoint)
        manifest = checkpoint.manifest
        self.progress = progress = manifest.progress.model_copy(deep=True)
        self.plan.require_place(*progress.place, where=str(checkpoint.path))
        if not compares:
            progress.compared_from = len(progress.history)
        self.total_steps = progress.step + max(self.plan.total - self.plan.completed(*progress.place), 0)
        stored = self.engine.broadcast(exported_step(self.run.path / "model"))
        self.has_model = stored is not None and stored == progress.exported_step
        self.engine.strategy.set_step_count(progress.updates)
        self.engine.strategy.restore_loss_scale(manifest.loss_scale)
        self.run.step = progress.step
        self.checkpointer.written_step = progress.step if in_place else None

    def catch_up(self, checkpoint: Checkpoint, view: HubView) -> None:
        """Push what the run directory has of an earlier attempt, and the Hub has not."""
        self.pushed_model = view.model
        there = view.own.newest_step if view.own else -1
        files = checkpoint.manifest.files
        own_disk = self.engine.is_local_main and not all((checkpoint.path / name).is_file() for name in files)
        if checkpoint.manifest.step > there and (self.engine.is_main or own_disk):
            self.publisher.offer_state(checkpoint.path, checkpoint.manifest)
        elif checkpoint.manifest.step > there:  # the main process pushes all of it
            self.publisher.pass_over_state(checkpoint.manifest)
        if self.has_model:
            self._offer_exported()

    def _offer_exported(self) -> None:
        """Push model/, unless the Hub had it, or a newer one, when the run went on."""
        epoch, step = self.progress.exported_epoch, self.progress.exported_step
        if epoch and step is not None and (self.pushed_model is None or self.pushed_model.step < step):
            self.publisher.offer_model(step, epoch)

    def fit(self) -> None:
        """Train and evaluate every epoch that is left. Raises `TrainingError` when that cannot go on, or a last
        checkpoint could not be written, `StoppedError`, and `NotPushedError`."""
        with self.tracker.training(self.total_steps, self.progress.step):
            try:
                self._run_epochs()
                if not self.has_model and self.progress.step > 0:
                    self._complete_directory()
            except (StoppedError, NonFiniteError) as error:  # agreed by all ranks, so all are here
                usable = not isinstance(error, NonFiniteError) or error.weights_are_finite
                if usable:
                    self._checkpoint()
                self.checkpointer.finish()
                if usable and not self.has_model and self.progress.step > 0:
                    self._export(0, None)
                self._drain_together(STOPPED_SECONDS if isinstance(error, StoppedError) else math.inf)
                raise
            except UserError:  # what is being written and pushed is not given up; some ranks may have gone
                self.checkpointer.finish()
                self._drain()
                raise
            if self.checkpointer.written_step != self.progress.step:
                self._checkpoint()
            self.checkpointer.finish()
            missing = self._drain_together()
        self.checkpointer.raise_if_failed()
        if missing:
            raise NotPushedError(
                f"training is done, and its results are in {self.run.path}, but the Hub lacks {missing}. To push it: "
                f"qa-dist hub push {self.run.path}"
            )
        self.tracker.say("\n".join([f"done: {self.run.path}", *after_completion(self.run.path)]))

    def _drain_together(self, seconds: float = math.inf) -> str:
        """`_drain` on all ranks, with the same answer on all: none ends while another waits."""
        missing = ""

        def drain() -> None:
            nonlocal missing
            missing = self._drain(seconds)

        self.engine.on_ranks(drain)
        return self.engine.broadcast(missing)

    def _drain(self, seconds: float = math.inf) -> str:
        """Push what is left, and wait for the Hub: at most so long, and until a signal. Returns what the Hub lacks of
        what the run ends with; on the main process."""
        self._tell()
        self.engine.watchdog.rest()  # for as long as the settings say
        asked_before = self.stop.is_asked
        longest = min(seconds, self.config.hub.drain_timeout)
        if status := self.publisher.status:
            self.tracker.say(f"waiting for the Hub, at most {longest:g} s ({status})")
        summary = self.publisher.finish(longest, lambda: self.stop.is_asked and not asked_before, self._tell)
        self._tell()
        if summary is None:
            return ""
        self.tracker.say(str(summary))
        return "; ".join(f"{name} ({reason})" for name, reason in summary.missing.items())

    def _run_epochs(self) -> None:
        progress = self.progress
        if self.config.evaluation.at_start and not progress.history and progress.step == 0:
            self._evaluate(epoch=0, train_loss=None)
        while progress.epoch <= self.config.train.epochs:
            self._train_epoch()
            epoch, train_loss = progress.epoch, progress.loss_sum / progress.loss_count if progress.loss_count else None
            score = self._evaluate(epoch, train_loss)
            if self.config.run.export == "last" or self._is_best():
                self._export(epoch, score)
            self._write_metrics()
            if self.progress.exported_epoch == epoch:
                self.publisher.offer_model(self.progress.step, epoch)
            progress.epoch, progress.batches_done, progress.batches_in_epoch = epoch + 1, 0, 0
            progress.loss_sum, progress.loss_count = 0.0, 0
            if self.checkpointer.is_due_after_epoch(epoch):
                self._checkpoint(score.metrics[self.task.best_metric] if score else None)

    def _train_epoch(self) -> None:
        """Run the steps that are left of the epoch."""
        progress = self.progress
        if progress.place[0] > progress.epoch:
            return
        batches = self.plan.batches(progress.epoch)
        progress.batches_in_epoch = len(batches)
        left = batches[progress.batches_done :]
        started = time.perf_counter()
        for batch, collated, waited in made_ahead(left, self.step.collate):
            rate = self.plan.learning_rate(*progress.place)
            self.engine.watchdog.step(f"step {progress.step + 1}", "training")
            is_due = self.engine.is_main and self.checkpointer.is_due_by_the_clock()
            result = self.step.run(progress.step, rate, batch, collated, is_due)
            self._count(result, batch, time.perf_counter() - started, waited)
            if progress.step % self.config.run.log_every == 0 or progress.step == self.total_steps:
                self._log(progress.epoch - 1 + progress.batches_done / len(batches), rate, result)
            if result.stopping:
                raise self.stop.error(self.engine)
            if result.is_due or self.checkpointer.is_due_after_step(progress.step):
                self._checkpoint()
            self._tell()
            started = time.perf_counter()

    def _checkpoint(self, score: float | None = None) -> None:
        self.engine.watchdog.phase("waiting until the previous checkpoint is written")
        self.checkpointer.finish()
        self.engine.watchdog.step("copying the state for a checkpoint", "checkpoint")
        self.checkpointer.save(self.progress, score)
        self.engine.watchdog.phase("writing a checkpoint")

    def _tell(self) -> None:
        """Say what the background has to say."""
        for text in [*self.checkpointer.news(), *self.publisher.notes()]:
            self.tracker.say(text)
        for event in self.publisher.events():
            values = {"what": event.what, "lane": event.push.lane, "seconds": event.seconds, "reason": event.reason}
            self.tracker.log_push(event.push.step, str(event), values)

    def _count(self, result: StepResult, batch: Indices, seconds: float, waited: float) -> None:
        progress = self.progress
        progress.step += 1
        progress.batches_done += 1
        self.run.step = progress.step
        progress.train_seconds += seconds
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if result.skipped else 0
        if not result.skipped:
            progress.updates += 1
            progress.loss_sum += result.loss
            progress.loss_count += 1
        lengths = self.training_set.lengths[batch]
        progress.meter.add(
            None if result.skipped else result.loss,
            samples=len(batch),
            tokens=int(lengths.sum()),
            padded_tokens=result.padded_tokens,
            flops=self.flops(lengths) if self.flops else 0.0,
            times=(seconds, waited),
        )
        self.tracker.advance()
        if progress.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise TrainingError(
                f"{progress.skipped_in_a_row} steps in a row, up to step {progress.step}, have overflowed float16 and "
                f"were left out (the loss scale is down to {result.loss_scale}). Use bf16, where the GPU has it, or "
                "lower train.learning_rate"
            )

    def _log(self, epoch: float, rate: float, result: StepResult) -> None:
        meter, self.progress.meter = self.progress.meter, Meter()
        values = {"epoch": epoch, "learning_rate": rate, "grad_norm": result.grad_norm}
        values |= meter.figures(self.engine.world_size, self.peak_flops)
        if result.loss_scale is not None:
            values["loss_scale"] = result.loss_scale
        values["peak_memory_gib"] = self.engine.max(peak_memory(self.engine.device))
        self.tracker.log_step(self.progress.step, self.total_steps, values)

    def _evaluate(self, epoch: int, train_loss: float | None) -> Score | None:
        score = None
        if "validation" in self.sets:
            batch_size = self.config.evaluation.batch_size
            with self.tracker.doing("evaluating"):
                score = evaluate(self.engine, self.task, self.sets["validation"], batch_size, self.stop)
        row = {"epoch": epoch, "step": self.progress.step, "train_loss": train_loss}
        self.progress.add_row(row | (score.metrics if score else {}))
        self.tracker.log_evaluation(self.progress.step, self.progress.history)
        return score

    def _is_best(self) -> bool:
        """Return whether the last epoch is the first, or better than all before that compare with it; without
        evaluation the newest is."""
        metric = self.task.best_metric
        rows = self.progress.history[self.progress.compared_from :]
        figures = [row.get(metric, math.inf) for row in rows if row["epoch"] > 0]
        return (
            not self.progress.exported_epoch
            or len(figures) == 1
            or figures[-1] > max(figures[:-1])
            or figures[-1] == math.inf
        )

    def _export(self, epoch: int, score: Score | None) -> None:
        """Make model/ and the predictions those of `epoch`."""
        self.engine.watchdog.phase("the export of the model")
        strategy = self.engine.strategy
        model = strategy.plain_model()
        weights = full_weights(strategy, self.engine.is_main)

        def write() -> None:
            assert weights is not None
            if bad := non_finite(weights):
                raise TrainingError(
                    f"model/ is left as it was: {listing(bad, 3)} of step {self.progress.step} not finite"
                )
            findings = score.findings if score else {}
            step = self.progress.step
            export_model(self.run.path / "model", model, weights, self.task, self.config, findings, step)
            for name, content in (score.files if score else {}).items():
                self.run.write_json(name, content)

        self.engine.on_main(write)
        self.progress.exported_epoch, self.progress.exported_step = epoch, self.progress.step
        self.has_model = True

    def _complete_directory(self) -> None:
        """Where a run that went on in a new directory had no (better) epoch left: fill the directory all the same, with
        the best model if it is on the Hub, else with the last one."""
        best, step = self.progress.exported_epoch, self.progress.exported_step
        last = self.progress.history[-1]["epoch"]
        is_best = not best or best == last
        if not is_best and step is not None:
            if fetch_model(self.engine, self.config, self.pushed_model, step):
                self.has_model = True
                self._write_metrics()
                self.tracker.say(f"model/ is that of epoch {best}, from the Hub")
                return
            self.tracker.say(f"note: model/ is that of epoch {last}; the better one of epoch {best} is where it was")
        score = None
        if "validation" in self.sets:
            batch_size = self.config.evaluation.batch_size
            score = evaluate(self.engine, self.task, self.sets["validation"], batch_size, self.stop)
        self._export(last, score)
        self._write_metrics()
        if is_best or self.pushed_model is None:
            self._offer_exported()

    def _write_metrics(self) -> None:
        """metrics.json: the figures of the exported epoch, and all epochs' history."""
        exported = next(row for row in self.progress.history if row["epoch"] == self.progress.exported_epoch)
        content = {name: value for name, value in exported.items() if name not in ("step", "train_loss", "changed")}
        content |= {"history": self.progress.history, "train_seconds": self.progress.train_seconds}
        self.engine.on_main(lambda: self.run.write_json("metrics.json", content))
