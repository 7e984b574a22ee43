"""What a person sees while a run goes on: a progress bar and tables, TensorBoard, JSON lines."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from qa_dist.reporting.run_directory import RunDirectory
from qa_dist.tasks.task import FeatureSet

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

History = list[dict[str, Any]]


def announce(text: str) -> None:
    """Say something before there is a run to track."""
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


class Tracker:
    """Shows and stores figures. On all but the main process every method does nothing."""

    def __init__(self, run: RunDirectory, headline: dict[str, str]):
        self.run = run
        self.headline = headline
        self.console = Console(quiet=not run.is_main, soft_wrap=True, highlight=False)
        self._progress: Progress | None = None
        self._bar = TaskID(0)
        self._figures = ""
        """Of the last logged step, beside the progress bar."""
        self._tensorboard: SummaryWriter | None = None
        self.background: Callable[[], str] = lambda: ""
        """A few words on what goes on beside training, for the progress line."""

    @contextlib.contextmanager
    def training(self, total_steps: int, done: int = 0) -> Iterator[None]:
        """While training, after `done` steps: TensorBoard is open, and a terminal shows a progress bar."""
        if not self.run.is_main:
            yield
            return
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=done + 1 if done else None)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        try:
            with progress:
                self._bar = progress.add_task("", total=total_steps, completed=done, figures="")
                self._progress = progress
                yield
        finally:
            self._progress, self._figures = None, ""
            self._tensorboard.close()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def advance(self) -> None:
        """One more optimizer step is done."""
        if self._progress:
            self._progress.advance(self._bar)

    def _show(self, text: str) -> None:
        """Put `text` beside the progress bar."""
        if self._progress:
            self._progress.update(self._bar, figures=f"{text}  {self.background()}")

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Put `what` beside the progress bar while it is done, and then the figures of the last logged step again."""
        self._show(what)
        try:
            yield
        finally:
            self._show(self._figures)

    def log_step(self, step: int, total_steps: int, values: dict[str, float]) -> None:
        """`values` hold loss, learning_rate, grad_norm, samples_per_second and epoch."""
        self._store("train", step, values)
        figures = (
            f"loss {values['loss']:.3f}  lr {values['learning_rate']:.1e}  {values['samples_per_second']:.1f} samples/s"
        )
        self._figures = figures
        self._show(figures)
        if not self.console.is_terminal:
            left = (total_steps - step) * values["seconds_per_step"]
            text = f"step {step}/{total_steps}  {figures}  {left:.0f} s of training left"
            self.say(f"{text}  {self.background()}".rstrip())

    def log_push(self, step: int, text: str, values: dict[str, Any]) -> None:
        """Something has happened to a push of `step`."""
        self.say(text)
        self.run.append_metrics({"kind": "hub", "step": step, **values})

    def log_evaluation(self, step: int, history: History) -> None:
        """Store the last row of `history` and show the whole as a table."""
        self._store("evaluation", step, {k: v for k, v in history[-1].items() if k != "step"})
        columns = ("epoch", "step", "train loss", *self.headline.values())
        table = Table(*columns, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # eight fit into 80 characters
        for row in history:
            shown = [row["epoch"], row["step"], row["train_loss"], *(row.get(name) for name in self.headline)]
            table.add_row(*(_shown(value) for value in shown))
        self.console.print(table)

    def log_figures(self, metrics: dict[str, float]) -> None:
        """Show the headline figures of a single evaluation."""
        self._store("evaluation", 0, metrics)
        table = Table(*self.headline.values())
        table.add_row(*(_shown(metrics.get(name)) for name in self.headline))
        self.console.print(table)

    def _store(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self.run.append_metrics({"kind": kind, "step": step, **values})
        if self._tensorboard:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
            self._tensorboard.flush()


def _shown(value: float | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def summary_table(sets: Mapping[str, FeatureSet]) -> Table:
    """A column of figures for each split."""
    table = Table("", *sets)
    summaries = [features.summary() for features in sets.values()]
    for name in summaries[0] if summaries else ():
        table.add_row(name, *(summary.get(name, "") for summary in summaries))
    return table
