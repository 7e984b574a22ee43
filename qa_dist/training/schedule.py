"""The plan of a run: its batches, and the learning rate as a pure function of the completed share of them.

The share is counted in global batches: those of the completed epochs, as the present settings would cut them, and those
done in the current epoch. So a run that was resumed with other epochs, another batch size or other data is on the curve
of its present settings, at the share of the epochs that is done.
"""

import math

import numpy as np
import numpy.typing as npt

from qa_dist.config import TrainConfig
from qa_dist.errors import UserError
from qa_dist.training.batching import Indices, plan_epoch


class RunPlan:
    """The global batches of all epochs, as settings and data make them. A run's place in it is the number of its epoch,
    from 1, and the number of batches done of that epoch."""

    def __init__(self, settings: TrainConfig, lengths: npt.NDArray[np.integer]):
        """`lengths` are those of the training features, in tokens, [num_features]."""
        self.settings = settings
        self.lengths = lengths
        self.batches_per_epoch = [len(self.batches(epoch + 1)) for epoch in range(settings.epochs)]
        self.total = sum(self.batches_per_epoch)

    def batches(self, epoch: int) -> list[Indices]:
        """Return the global batches of `epoch`, in order."""
        return plan_epoch(
            self.lengths,
            seed=self.settings.seed,
            epoch=epoch,
            global_batch_size=self.settings.global_batch_size,
            tokens_per_batch=self.settings.tokens_per_batch,
            group_by_length=self.settings.group_by_length,
        )

    def completed(self, epoch: int, batches_done: int) -> int:
        """Return the number of batches before a place. It is the number of steps done, unless epochs, batches or data
        have changed since the run began."""
        return sum(self.batches_per_epoch[: epoch - 1]) + batches_done

    def require_place(self, epoch: int, batches_done: int, where: str) -> None:
        """Raise `UserError` if no run with this plan can be at a place; `where` names the checkpoint that says so."""
        planned = self.batches_per_epoch[epoch - 1] if epoch <= len(self.batches_per_epoch) else 0
        if batches_done > planned:
            raise UserError(
                f"{where}: its manifest says that {batches_done} batches of epoch {epoch} are done, and there are only "
                f"{planned}: it was not written by a run with these data and settings"
            )

    def learning_rate(self, epoch: int, batches_done: int) -> float:
        """Return the learning rate of the batch at a place."""
        return learning_rate(self.completed(epoch, batches_done), self.total, self.settings)


def learning_rate(step: int, total_steps: int, settings: TrainConfig) -> float:
    """Return the learning rate of global batch `step` (from 0) of the run's `total_steps`.

    It rises linearly over the first `warmup_ratio` of the batches and then follows `schedule`; the cosine is that of
    Loshchilov and Hutter 2017, without restarts. Every batch of a run has a rate above zero, the first and last too;
    beyond the end the rate stays that of the end. It is never below zero or above `settings.learning_rate`.
    """
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    remaining = max(total_steps - step, 0) / max(total_steps - warmup, 1)
    if settings.schedule == "linear":
        return settings.learning_rate * remaining
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1.0 - math.cos(math.pi * remaining))
    return settings.learning_rate
