"""One optimizer step on a global batch, the same on any number of processes."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qa_dist.config import TrainConfig
from qa_dist.errors import TrainingError, listing
from qa_dist.tasks.task import Batch, FeatureSet, Task
from qa_dist.training.batching import Indices, MicroBatch, shard
from qa_dist.training.engine import Engine, seed_step
from qa_dist.training.preemption import StopRequest
from qa_dist.training.strategies import NonFiniteGradientError, Strategy


class NonFiniteError(TrainingError):
    """A loss or a gradient is not finite. The weights are those before the step."""

    def __init__(self, reason: str, *, weights_are_finite: bool):
        super().__init__(reason)
        self.weights_are_finite = weights_are_finite
        """False where an earlier step has spoiled the weights already, so that they are of no use."""


@dataclass(frozen=True)
class StepResult:
    """What all ranks know of a step that is done."""

    loss: float
    """Mean over the windows of the global batch; not finite only in a skipped step."""
    grad_norm: float
    skipped: bool
    """Whether float16 overflowed, so that the weights were left as they are."""
    loss_scale: float | None
    padded_tokens: int
    """Tokens and padding that the model was given, on all ranks."""
    stopping: bool
    """Whether any rank was asked to stop."""
    is_due: bool = False
    """Whether the main process's clock says that it is time for a checkpoint."""


class Collated(NamedTuple):
    """A micro-batch ready for the device."""

    part: MicroBatch
    batch: Batch


def _weights_are_finite(strategy: Strategy) -> bool:
    """Return whether all master weights are finite. All ranks have to call it."""
    found = [bool(strategy.whole_weight(one).isfinite().all()) for one in strategy.plain_model().parameters()]
    return all(found)


class Step:
    """Runs optimizer steps on this rank's share of global batches."""

    def __init__(
        self,
        settings: TrainConfig,
        engine: Engine,
        task: Task,
        features: FeatureSet,
        micro_batch_size: int,
        stop: StopRequest,
    ):
        self.settings = settings
        self.engine = engine
        self.task = task
        self.features = features
        self.micro_batch_size = micro_batch_size
        self.stop = stop

    def collate(self, batch: Indices) -> list[Collated]:
        """This rank's share of the global batch. Touches nothing but the features, so that a thread may call it."""
        engine = self.engine
        parts = shard(
            batch,
            self.features.lengths,
            rank=engine.rank,
            world_size=engine.world_size,
            micro_batch_size=self.micro_batch_size,
            cost_of_micro_batch=engine.cost_of_micro_batch,
        )
        return [Collated(part, engine.staged(self.features.collate(part.indices, engine.multiple))) for part in parts]

    def run(
        self, number: int, rate: float, batch: Indices, collated: list[Collated], is_due: bool = False
    ) -> StepResult:
        """Optimizer step `number` (from 0) at learning rate `rate`.

        The loss is the mean over the windows of the global batch, however they are divided: each rank's sum is
        scaled by world size / batch size, since the engines average gradients over the ranks. Raises
        `NonFiniteError` on all ranks.
        """
        engine, strategy = self.engine, self.engine.strategy
        seed_step(self.settings.seed, number, engine.rank)
        engine.set_learning_rate(rate)
        losses: list[Tensor] = []
        padded_tokens = 0
        for part, on_host in collated:
            with strategy.accumulating(last=part is collated[-1].part):
                output, on_device = engine.forward(on_host)
                loss = self.task.loss(output, on_device) * part.weight
                strategy.backward(loss.sum() * (engine.world_size / len(batch)))
            losses.append(loss.detach())
            padded_tokens += on_host.positions
        # One collective for all that the ranks have to agree on.
        own = [padded_tokens, self.stop.is_asked, is_due]
        flags = torch.tensor(own, dtype=torch.float32, device=engine.device)
        total, padded, stops, dues = engine.sum(torch.cat([torch.cat(losses).sum()[None], flags])).tolist()
        mean = total / len(batch)
        if not math.isfinite(mean) and not engine.is_half:
            raise self._non_finite(number, f"the loss is {mean}", collated, losses)
        try:
            update = strategy.update()
        except NonFiniteGradientError:
            raise self._non_finite(number, "the gradient holds an infinity or no number", collated, losses) from None
        if not math.isfinite(mean) and not update.skipped:
            raise self._non_finite(number, f"the loss is {mean}", collated, losses)
        return StepResult(mean, update.grad_norm, update.skipped, update.loss_scale, int(padded), stops > 0, dues > 0)

    def _non_finite(self, number: int, what: str, collated: list[Collated], losses: list[Tensor]) -> NonFiniteError:
        """The error to raise, naming the ranks and examples whose losses are to blame. All ranks have to call it."""
        bad: list[int] = []
        for (part, _), loss in zip(collated, losses, strict=True):
            if part.weight:
                bad.extend(part.indices[~loss.isfinite().cpu().numpy()].tolist())
        names = self.features.names(np.array(bad, dtype=np.int64))
        found = self.engine.gather((self.engine.rank, names))
        places = [f"on rank {rank} for {listing(list(dict.fromkeys(names)))}" for rank, names in found if names]
        who = ", " + ", ".join(places) if places else ", though all losses are finite"
        usable = _weights_are_finite(self.engine.strategy)
        kept = (
            "The weights are kept as they were before this step"
            if usable
            else "The weights were not finite before this step either, so they are not kept; the newest checkpoint "
            "is of an earlier step"
        )
        return NonFiniteError(
            f"{what} at step {number + 1}{who}. {kept}. Lower train.learning_rate, raise train.warmup_ratio, or look "
            "at these examples",
            weights_are_finite=usable,
        )
