"""The learning rate as a pure function of the step."""

import math

from qa_dist.config import TrainConfig


def learning_rate(step: int, total_steps: int, settings: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    It rises linearly over the first `warmup_ratio` of the steps and then follows `schedule`; the cosine is that
    of Loshchilov and Hutter 2017, without restarts. Every step has a rate above zero, the first and last too.
    """
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    remaining = (total_steps - step) / max(total_steps - warmup, 1)
    if settings.schedule == "linear":
        return settings.learning_rate * remaining
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1.0 - math.cos(math.pi * remaining))
    return settings.learning_rate
