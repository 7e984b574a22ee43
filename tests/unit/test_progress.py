"""What the loop counts, and when it gives up."""

import dataclasses
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qa_dist.checkpoint.progress import Progress
from qa_dist.config import RunConfig
from qa_dist.errors import TrainingError
from qa_dist.reporting.run_directory import RunDirectory
from qa_dist.reporting.tracker import Tracker
from qa_dist.training.loop import Training
from qa_dist.training.prefetch import made_ahead
from qa_dist.training.step import StepResult

DONE = StepResult(loss=2.0, grad_norm=1.0, skipped=False, loss_scale=8.0, padded_tokens=16, stopping=False)
SKIPPED = dataclasses.replace(DONE, loss=float("inf"), skipped=True)


def training() -> Any:
    made: Any = object.__new__(Training)
    made.config = RunConfig.model_validate({"train": {"max_skipped_steps": 3}})
    made.progress = Progress()
    made.training_set = SimpleNamespace(lengths=np.array([5, 7, 9]))
    made.flops = None
    made.run = SimpleNamespace(step=0)
    made.tracker = SimpleNamespace(advance=lambda: None)
    return made


def test_skipped_steps_count_as_steps_but_not_as_updates():
    made = training()
    for result in (DONE, SKIPPED, SKIPPED, DONE, SKIPPED):
        made._count(result, np.array([0, 2]), 0.5, 0.1)
    progress = made.progress
    assert (progress.step, progress.updates, progress.skipped_in_a_row) == (5, 2, 1)
    assert (progress.loss_sum, progress.loss_count) == (4.0, 2)
    assert (progress.meter.tokens, progress.meter.skipped, progress.meter.samples) == (70, 3, 10)
    figures = progress.meter.figures(world_size=1, peak=None)
    assert figures["loss"] == 2.0
    assert figures["padding"] == pytest.approx(1 - 70 / 80)


def test_too_many_skipped_steps_in_a_row_end_the_run():
    made = training()
    for _ in range(2):
        made._count(SKIPPED, np.array([1]), 0.5, 0.0)
    with pytest.raises(TrainingError, match="3 steps in a row, up to step 3, have overflowed float16"):
        made._count(SKIPPED, np.array([1]), 0.5, 0.0)


def test_progress_survives_json():
    made = training()
    made._count(DONE, np.array([0, 1]), 0.5, 0.0)
    made.progress.history.append({"epoch": 1, "step": 1, "f1": 3.5})
    assert Progress.model_validate_json(made.progress.model_dump_json()) == made.progress


def test_items_are_made_ahead_in_order_and_errors_come_where_the_item_would():
    def make(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item * item

    seen = []
    with pytest.raises(ValueError, match="three"):
        for item, made, waited in made_ahead(range(5), make):
            seen.append((item, made))
            assert waited >= 0
    assert seen == [(0, 0), (1, 1), (2, 4)]
    assert list(made_ahead([], make)) == []


def test_the_bar_says_evaluating_only_while_that_goes_on(tmp_path: Path):
    def bar() -> str:
        """What a terminal shows of it now."""
        assert tracker._progress is not None
        tracker._progress.refresh()
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue().rpartition("training")[2])

    screen = io.StringIO()
    tracker = Tracker(RunDirectory(tmp_path, is_main=True), {})
    tracker.console = Console(file=screen, force_terminal=True, width=120)
    figures = {"loss": 1.25, "learning_rate": 1e-3, "samples_per_second": 8.0, "seconds_per_step": 1.0}
    with tracker.training(10):
        with tracker.doing("evaluating"):  # before the first logged step
            assert "evaluating" in bar()
        assert "evaluating" not in bar()
        tracker.log_step(1, 10, figures)
        with pytest.raises(TrainingError), tracker.doing("evaluating"):
            assert "evaluating" in bar()
            raise TrainingError("no")
        assert "loss 1.250" in bar()
        assert "evaluating" not in bar()
