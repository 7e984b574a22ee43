from typing import Any

import pytest

from qa_dist.config import TrainConfig
from qa_dist.training.schedule import learning_rate


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
