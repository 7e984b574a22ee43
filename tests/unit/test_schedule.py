import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_dist.config import TrainConfig
from qa_dist.errors import UserError
from qa_dist.training.schedule import RunPlan, learning_rate


def rates(total: int, **settings: Any) -> list[float]:
    config = TrainConfig.model_validate({"learning_rate": 1.0} | settings)
    return [learning_rate(step, total, config) for step in range(total)]


def test_linear():
    assert rates(4, warmup_ratio=0.0) == [1.0, 0.75, 0.5, 0.25]
    assert rates(6, warmup_ratio=0.3, schedule="linear") == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])


def test_cosine():
    assert rates(4, warmup_ratio=0.0, schedule="cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_constant():
    assert rates(3, warmup_ratio=0.0, schedule="constant") == [1.0] * 3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_never_zero_and_never_above_the_peak(schedule: str, warmup: float, total: int):
    values = rates(total, schedule=schedule, warmup_ratio=warmup)
    assert all(0.0 < value <= 1.0 for value in values)


settings = st.builds(
    TrainConfig,
    learning_rate=st.sampled_from([1.0, 5e-5, 3e-4]),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    warmup_ratio=st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.floats(0, 1)),
    epochs=st.integers(1, 6),
    global_batch_size=st.integers(1, 20),
    group_by_length=st.booleans(),
)


def simple(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return what a run whose plan never changes gets: the expressions in this order, so that every bit is the same."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    remaining = (total_steps - step) / max(total_steps - warmup, 1)
    if config.schedule == "linear":
        return config.learning_rate * remaining
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 - math.cos(math.pi * remaining))
    return config.learning_rate


@given(settings, st.integers(1, 40), st.one_of(st.none(), st.integers(40, 90)))
def test_unchanged_runs_keep_their_rates_to_the_last_bit(config: TrainConfig, features: int, tokens: int | None):
    lengths = np.random.default_rng(features).integers(5, 20, features)
    plan = RunPlan(config.model_copy(update={"tokens_per_batch": tokens}), lengths)
    places = [(epoch, i) for epoch, size in enumerate(plan.batches_per_epoch, 1) for i in range(size)]
    assert len(places) == plan.total
    for step, place in enumerate(places):
        assert plan.completed(*place) == step
        assert plan.learning_rate(*place) == simple(step, plan.total, config)


@given(settings, st.integers(0, 300), st.integers(0, 200))
def test_no_step_leaves_the_range(config: TrainConfig, step: int, total: int):
    assert 0.0 <= learning_rate(step, total, config) <= config.learning_rate


def slope(step: int, total: int, config: TrainConfig) -> float:
    """Return how much the rate may change from one step to the next there."""
    warmup = math.ceil(config.warmup_ratio * total)
    rise = 1 / (warmup + 1) if step <= warmup + 1 else 0.0
    return config.learning_rate * max(rise, math.pi / 2 / max(total - warmup, 1))


@given(settings, settings, st.integers(1, 300), st.integers(1, 300), st.data())
def test_a_changed_run_continues_at_its_completed_share(
    before: TrainConfig, changes: TrainConfig, features: int, others: int, data: st.DataObject
):
    """Other batches, other data, other numbers of epochs: from the end of an epoch the rate is that of the present
    settings at the share of the epochs that is done, and the last batch is the last of the schedule."""
    epochs = changes.epochs
    now = before.model_copy(
        update={"epochs": epochs, "global_batch_size": changes.global_batch_size, "group_by_length": True}
    )
    then, after = RunPlan(before, np.full(features, 7)), RunPlan(now, np.full(others, 9))
    epoch = data.draw(st.integers(1, before.epochs + 1))
    places = [(e, i) for e in range(epoch, epochs + 1) for i in range(after.batches_per_epoch[e - 1])]
    steps_done = then.completed(epoch, 0)
    assert after.completed(epoch, 0) + len(places) == (after.total if epoch <= epochs else after.completed(epoch, 0))
    found = [after.learning_rate(*place) for place in places]
    assert all(0.0 < rate <= now.learning_rate for rate in found)
    if places:
        assert found[0] == simple(after.completed(epoch, 0), after.total, now)
        assert found[-1] == simple(after.total - 1, after.total, now)
        assert after.completed(epoch, 0) / after.total == pytest.approx((epoch - 1) / epochs)
    if places and epochs == before.epochs:  # then it is where it was, as far as the steps are fine enough
        old, new = (steps_done, then.total, before), (after.completed(epoch, 0), after.total, now)
        assert abs(simple(*old) - found[0]) <= 2 * (slope(*old) + slope(*new))


def test_a_place_that_no_run_can_be_at_is_refused():
    plan = RunPlan(TrainConfig(epochs=2, global_batch_size=4), np.full(10, 30))
    for place in ((1, 0), (1, 3), (2, 3), (3, 0)):
        plan.require_place(*place, where="step_00000003")
    for place in ((1, 4), (2, 10**15), (3, 1)):
        with pytest.raises(UserError, match=r"step_00000003: its manifest says that \d+ batches of epoch"):
            plan.require_place(*place, where="step_00000003")
