"""Training: epochs and steps.

`train` reads as the story of a run. Who owns what: the plan of an epoch is a pure function (`batching`), the
engine owns the model and the optimizer, the run directory owns the files, and `Progress` holds the few numbers
that change.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from qa_dist.checkpoint.state import full_weights
from qa_dist.config import RunConfig
from qa_dist.config_sources import to_yaml
from qa_dist.errors import TrainingError
from qa_dist.reporting.run_directory import RunDirectory, StoppedError
from qa_dist.reporting.tracker import History, Tracker, summary_table
from qa_dist.tasks import load_task
from qa_dist.tasks.task import FeatureSet, Score, Task
from qa_dist.training.batching import Indices, num_batches, plan_epoch, shard
from qa_dist.training.engine import Engine, is_lost_connection, seed_step
from qa_dist.training.evaluation import evaluate
from qa_dist.training.export import export_model
from qa_dist.training.launch_environment import LaunchEnvironment
from qa_dist.training.models import build_model
from qa_dist.training.preemption import StopRequest
from qa_dist.training.schedule import learning_rate


@dataclass
class Progress:
    """The numbers that change while a run goes on."""

    step: int = 0
    """Optimizer steps done."""
    train_seconds: float = 0.0
    """Time spent in training steps, without evaluation."""
    history: History = field(default_factory=list)
    """One row per evaluation, or per epoch where nothing is evaluated."""
    exported_epoch: int | None = None
    """The epoch whose weights lie in model/."""


@dataclass
class Window:
    """Sums since the last logged step."""

    loss: float = 0.0
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0

    def add(self, loss: float, samples: int, seconds: float) -> None:
        """Count one more step."""
        self.loss += loss
        self.steps += 1
        self.samples += samples
        self.seconds += seconds


def train(config: RunConfig, launch: LaunchEnvironment) -> None:
    """Train and evaluate as `config` says, and leave the results in the run directory.

    Raises `UserError` for what the user can mend, and `StoppedError` after a signal.
    """
    with _session(config, launch) as (engine, run, stop):
        parts = _load(config, engine, run, stop, ("train", "validation"))
        engine.prepare(parts.model, config.train)
        _Training(config, engine, parts.task, run, parts.tracker, stop, parts.sets).fit()


def evaluate_only(config: RunConfig, launch: LaunchEnvironment) -> None:
    """Evaluate a trained model, and leave metrics and predictions in the run directory. Raises as `train` does."""
    with _session(config, launch) as (engine, run, stop):
        parts = _load(config, engine, run, stop, ("validation",))
        engine.prepare_for_evaluation(parts.model)
        score = evaluate(engine, parts.task, parts.sets["validation"], config.evaluation.batch_size, stop)

        def write() -> None:
            run.write_json("metrics.json", score.metrics)
            for name, content in score.files.items():
                run.write_json(name, content)

        engine.on_main(write)
        parts.tracker.log_figures(score.metrics)
        parts.tracker.say(f"done: {run.path}")


@contextlib.contextmanager
def _session(config: RunConfig, launch: LaunchEnvironment) -> Iterator[tuple[Engine, RunDirectory, StopRequest]]:
    """The processes joined, signals listened to, and a run directory that will tell how the run ended."""
    engine = Engine(launch, config.run.timeout_minutes)
    run = RunDirectory(config.output_dir, engine.is_main)
    stop = StopRequest()
    with stop.listening():
        engine.on_main(lambda: run.open(to_yaml(config), engine.description))
        with run.recorded():
            try:
                yield engine, run, stop
            except RuntimeError as error:
                if is_lost_connection(error):
                    raise TrainingError(
                        "another process of this run is gone: killed, out of memory, or failed; see what it or its "
                        f"node's log says ({str(error).splitlines()[0]})"
                    ) from None
                raise
    engine.close()


class _Parts(NamedTuple):
    task: Task
    sets: dict[str, FeatureSet]
    model: torch.nn.Module
    tracker: Tracker


def _load(config: RunConfig, engine: Engine, run: RunDirectory, stop: StopRequest, splits: tuple[str, ...]) -> _Parts:
    """The task, the features of `splits` and the model, the same on all ranks."""
    task = engine.local_main_first(lambda: load_task(config))
    sets: dict[str, FeatureSet] = {}
    for split in splits:
        stop.raise_if_any(engine)
        features = engine.local_main_first(lambda split=split: task.features(split))
        engine.require_same(features.fingerprint if features else "", f"the {split} features")
        if features is not None:
            sets[split] = features
    model, notes = engine.local_main_first(lambda: build_model(config, task, trained="train" not in splits))
    stop.raise_if_any(engine)
    tracker = Tracker(run, task.headline)
    _introduce(tracker, engine, model, notes, sets)
    return _Parts(task, sets, model, tracker)


def _introduce(
    tracker: Tracker, engine: Engine, model: torch.nn.Module, notes: list[str], sets: dict[str, FeatureSet]
) -> None:
    if not engine.is_main:
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tracker.say(f"{engine.description}; {parameters / 1e6:.1f} M parameters")
    for note in notes:
        tracker.say(f"model: {note}")
    tracker.console.print(summary_table(sets))
    for split, features in sets.items():
        for note in features.notes:
            tracker.say(f"{split}: note: {note}")


@dataclass
class _Training:
    config: RunConfig
    engine: Engine
    task: Task
    run: RunDirectory
    tracker: Tracker
    stop: StopRequest
    sets: dict[str, FeatureSet]
    progress: Progress = field(default_factory=Progress)
    window: Window = field(default_factory=Window)

    def __post_init__(self) -> None:
        settings = self.config.train
        self.training_set = self.sets["train"]
        self.steps_per_epoch = num_batches(len(self.training_set), settings.global_batch_size)
        self.total_steps = settings.epochs * self.steps_per_epoch
        share = -(-settings.global_batch_size // self.engine.world_size)
        self.micro_batch_size = min(settings.micro_batch_size or share, share)

    def fit(self) -> None:
        with self.tracker.training(self.total_steps):
            try:
                self._run_epochs()
            except StoppedError:  # agreed by all ranks, so all are here
                if self.progress.exported_epoch is None and self.progress.step > 0:
                    self._export(0, None)
                raise
        self.tracker.say(f"done: {self.run.path}")

    def _run_epochs(self) -> None:
        if self.config.evaluation.at_start:
            self._evaluate(epoch=0, train_loss=None)
        for epoch in range(1, self.config.train.epochs + 1):
            train_loss = self._train_epoch(epoch)
            score = self._evaluate(epoch, train_loss)
            if self.config.run.export == "last" or self._is_best():
                self._export(epoch, score)
            self._write_metrics()

    def _train_epoch(self, epoch: int) -> float:
        """Run an epoch's steps. Returns the mean loss over them."""
        settings = self.config.train
        batches = plan_epoch(
            self.training_set.lengths,
            seed=settings.seed,
            epoch=epoch,
            global_batch_size=settings.global_batch_size,
            group_by_length=settings.group_by_length,
        )
        total_loss = 0.0
        for batch in batches:
            started = time.perf_counter()
            rate = learning_rate(self.progress.step, self.total_steps, settings)
            loss, grad_norm, stopping = self._train_step(batch, rate)
            seconds = time.perf_counter() - started
            self.progress.step += 1
            self.run.step = self.progress.step
            self.progress.train_seconds += seconds
            total_loss += loss
            self.window.add(loss, len(batch), seconds)
            self.tracker.advance()
            if self.progress.step % self.config.run.log_every == 0 or self.progress.step == self.total_steps:
                self._log(rate, grad_norm)
            if stopping:
                raise self.stop.error()
        return total_loss / len(batches)

    def _train_step(self, batch: Indices, rate: float) -> tuple[float, float, bool]:
        """One optimizer step on a global batch. Returns its loss, the gradients' norm, and whether to stop.

        The loss is the mean over the features of the global batch, however they are divided: each rank's sum is
        scaled by world size / batch size, since the engines average gradients over the ranks.
        """
        engine, settings = self.engine, self.config.train
        seed_step(settings.seed, self.progress.step, engine.rank)
        engine.set_learning_rate(rate)
        micro_batches = shard(
            batch,
            self.training_set.lengths,
            rank=engine.rank,
            world_size=engine.world_size,
            micro_batch_size=self.micro_batch_size,
        )
        loss_sum = torch.zeros((), device=engine.device)
        for micro_batch in micro_batches:
            inputs = self.training_set.collate(micro_batch.indices).to(engine.device)
            with engine.accumulating(last=micro_batch is micro_batches[-1]):
                losses = self.task.loss(engine.model(**inputs.inputs), inputs) * micro_batch.weight
                engine.backward(losses.sum() * (engine.world_size / len(batch)))
            loss_sum += losses.detach().sum()
        grad_norm = engine.update()
        # One collective for all that the ranks have to agree on: the loss, and whether anyone was asked to stop.
        stop = torch.tensor(float(self.stop.signal_number > 0), device=engine.device)
        total, stops = engine.sum(torch.stack([loss_sum, stop])).tolist()
        loss = total / len(batch)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.progress.step + 1}: training has diverged. Lower "
                "train.learning_rate, or lengthen train.warmup_ratio"
            )
        return loss, grad_norm, stops > 0

    def _log(self, rate: float, grad_norm: float) -> None:
        window, self.window = self.window, Window()
        values = {
            "epoch": self.progress.step / self.steps_per_epoch,
            "loss": window.loss / window.steps,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "samples_per_second": window.samples / window.seconds,
            "seconds_per_step": window.seconds / window.steps,
        }
        self.tracker.log_step(self.progress.step, self.total_steps, values)

    def _evaluate(self, epoch: int, train_loss: float | None) -> Score | None:
        score = None
        if "validation" in self.sets:
            self.tracker.show("evaluating")
            batch_size = self.config.evaluation.batch_size
            score = evaluate(self.engine, self.task, self.sets["validation"], batch_size, self.stop)
        row = {"epoch": epoch, "step": self.progress.step, "train_loss": train_loss}
        self.progress.history.append(row | (score.metrics if score else {}))
        self.tracker.log_evaluation(self.progress.step, self.progress.history)
        return score

    def _is_best(self) -> bool:
        """Whether the last epoch is the first, or better than all before; without evaluation the newest is."""
        metric = self.task.best_metric
        figures = [row.get(metric, math.inf) for row in self.progress.history if row["epoch"] > 0]
        return len(figures) == 1 or figures[-1] > max(figures[:-1]) or figures[-1] == math.inf

    def _export(self, epoch: int, score: Score | None) -> None:
        """Make model/ and the predictions those of `epoch`."""
        weights = full_weights(self.engine.accelerator, self.engine.model)
        model = self.engine.accelerator.unwrap_model(self.engine.model, keep_torch_compile=False)

        def write() -> None:
            assert weights is not None
            export_model(
                self.run.path / "model", model, weights, self.task, self.config, score.findings if score else {}
            )
            for name, content in (score.files if score else {}).items():
                self.run.write_json(name, content)

        self.engine.on_main(write)
        self.progress.exported_epoch = epoch

    def _write_metrics(self) -> None:
        """metrics.json: the figures of the exported epoch, and all epochs' history."""
        exported = next(row for row in self.progress.history if row["epoch"] == self.progress.exported_epoch)
        content = {name: value for name, value in exported.items() if name not in ("step", "train_loss")}
        content |= {"history": self.progress.history, "train_seconds": self.progress.train_seconds}
        self.engine.on_main(lambda: self.run.write_json("metrics.json", content))
