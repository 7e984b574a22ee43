"""How far a run is: the counters and sums that a checkpoint stores beside its tensors.

These are records with checked types and ranges, since they are also read from files and repositories that anybody may
have written.
"""

import itertools
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=10**15)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Sum = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _check_row(row: dict[str, Any]) -> dict[str, Any]:
    for name, value in row.items():
        is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        if not is_number and not isinstance(value, str | None):
            raise ValueError(f"{name[:100]} is not a number")
    for name in ("epoch", "step"):
        if isinstance(row.get(name), bool) or not isinstance(row.get(name), int) or row[name] < 0:
            raise ValueError(f"{name} is not a count")
    return row


Row = Annotated[dict[str, Any], AfterValidator(_check_row)]
"""What was found after an epoch: `epoch`, `step`, `train_loss` and the metrics."""


class Record(BaseModel):
    """A record that is stored as JSON: exact types, and no fields that are not known."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Meter(Record):
    """Sums over the steps since the last logged one, over all ranks except for the times."""

    losses: list[Number] = Field(default_factory=list)
    """Losses of the steps that were not skipped."""
    steps: Count = 0
    skipped: Count = 0
    samples: Count = 0
    tokens: Count = 0
    padded_tokens: Count = 0
    """Tokens given to the model, padding included."""
    flops: Sum = 0.0
    seconds: Sum = 0.0
    data_seconds: Sum = 0.0
    """Seconds for which this process waited for its next batch."""

    def add(
        self,
        loss: float | None,
        *,
        samples: int,
        tokens: int,
        padded_tokens: int,
        flops: float,
        times: tuple[float, float],
    ) -> None:
        """Count one more step; `loss` is None for a skipped one, `times` are its seconds and those spent waiting."""
        self.steps += 1
        if loss is None:
            self.skipped += 1
        else:
            self.losses.append(loss)
        self.samples += samples
        self.tokens += tokens
        self.padded_tokens += padded_tokens
        self.flops += flops
        self.seconds += times[0]
        self.data_seconds += times[1]

    def figures(self, world_size: int, peak: float | None) -> dict[str, float]:
        """Return the sums as rates and shares; `peak` is the FLOP/s of one device."""
        steps, seconds = max(self.steps, 1), max(self.seconds, 1e-9)
        result = {
            "loss": sum(self.losses) / len(self.losses) if self.losses else float("nan"),
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "padding": 1 - self.tokens / max(self.padded_tokens, 1),
            "seconds_per_step": seconds / steps,
            "data_seconds": self.data_seconds,
            "skipped_steps": self.skipped,
        }
        if self.flops and peak:
            result["model_flops_utilization"] = self.flops / seconds / (peak * world_size)
        return result


class Progress(Record):
    """The numbers that change during a run; a checkpoint stores them all."""

    step: Count = 0
    """Optimizer steps done."""
    updates: Count = 0
    """Those that were not skipped."""
    epoch: Annotated[int, Field(ge=1, le=10**9)] = 1
    """The epoch that training is in, from 1."""
    batches_done: Count = 0
    """Global batches of that epoch that are done."""
    batches_in_epoch: Count = 0
    """Global batches that the epoch has in all; 0 before its first one, and in checkpoints that do not say."""
    loss_sum: Number = 0.0
    """Sum of the losses of the epoch's steps that were not skipped."""
    loss_count: Count = 0
    skipped_in_a_row: Count = 0
    """float16 steps that have overflowed since the last one that did not."""
    train_seconds: Sum = 0.0
    """Seconds spent in training steps, without evaluation."""
    history: list[Row] = Field(default_factory=list)
    """One row per evaluation, or per epoch where nothing is evaluated."""
    compared_from: Count = 0
    """Rows of the history before this one are on other validation data, or of an evaluation with other settings: scores
    are compared from this row on."""
    exported_epoch: Count | None = None
    """The epoch whose weights were exported last, to model/ of this run directory or of that of an earlier machine."""
    exported_step: Count | None = None
    """The step of that export, by which model/ is recognised."""
    meter: Meter = Field(default_factory=Meter)
    """Sums since the last logged step."""

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and batches done of the place where training continues: the next epoch after the last batch of one,
        also before the evaluation."""
        is_whole = 0 < self.batches_done == self.batches_in_epoch
        return (self.epoch + 1, 0) if is_whole else (self.epoch, self.batches_done)

    def add_row(self, row: Row) -> None:
        """Add what was found after an epoch to the history. The first row that does not compare with those before it
        has the entry `changed`."""
        is_first = 0 < self.compared_from == len(self.history)
        self.history.append(row | ({"changed": "validation"} if is_first else {}))

    def contradiction(self) -> str | None:
        """Return why these numbers cannot be those of one run, or None if they can."""
        rows = [(row["epoch"], row["step"]) for row in self.history]
        if any(later[0] <= row[0] or later[1] < row[1] for row, later in itertools.pairwise(rows)):
            return "the epochs or steps of its history are not in order"
        last_epoch, epoch_start = rows[-1] if rows else (0, 0)
        if self.epoch != last_epoch + 1:
            return f"it is in epoch {self.epoch}, and its history ends with epoch {last_epoch}"
        if self.step != epoch_start + self.batches_done:
            return f"{self.step} steps are not {epoch_start} before the epoch and {self.batches_done} of its batches"
        if self.batches_in_epoch and self.batches_done > self.batches_in_epoch:
            return f"it has done {self.batches_done} of {self.batches_in_epoch} batches"
        if self.compared_from > len(self.history):
            return f"it compares scores from row {self.compared_from} on, and its history has {len(self.history)} rows"
        if self.updates > self.step:
            return f"it has made {self.updates} updates in {self.step} steps"
        if self.loss_count > self.batches_done:
            return f"it has {self.loss_count} losses of {self.batches_done} batches"
        exported = self.exported_epoch, self.exported_step
        if exported != (None, None) and (None in exported or (self.exported_step or 0) > self.step):
            return f"it exported epoch {self.exported_epoch} at step {self.exported_step}, and has done {self.step}"
        return None
