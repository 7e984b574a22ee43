"""What every way of spreading a model over processes can do."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qa_dist.checkpoint.state import Part

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

NO_CLIPPING = 1e30
"""A norm that no gradient reaches: clipping to it changes nothing."""


class NonFiniteGradientError(Exception):
    """The gradient of a global batch holds an infinity or no number; the weights are those before it."""


@dataclass(frozen=True)
class Update:
    """What an optimizer step did."""

    grad_norm: float
    """L2 norm of the whole gradient, before clipping."""
    skipped: bool = False
    """Whether the gradient overflowed float16, so that the step was left out and the loss scale lowered."""
    loss_scale: float | None = None
    """What losses are multiplied with in float16."""


class Strategy(ABC):
    """One way of spreading a model over processes."""

    name: str
    """For people."""
    casts_weights = False
    """Whether the forward pass sees weights of low precision, rather than float32 ones under autocast."""
    exchanges_every_micro_batch = False
    """Whether gradients or weights travel with each micro-batch, not only with a global batch's last."""

    model: nn.Module
    """The wrapped model: call it as the plain one."""
    optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.max_grad_norm = NO_CLIPPING
        self._plain: Any = None

    @abstractmethod
    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Spread `model` over the processes, with an optimizer."""

    @abstractmethod
    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: gradients are exchanged with the `last` one at latest."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`: averaged over the ranks, summed over micro-batches."""

    @abstractmethod
    def update(self) -> Update:
        """Clip, update the weights and clear the gradients. Raises `NonFiniteGradientError`, on all ranks, instead
        of an update with such a gradient, unless it is float16's overflow."""

    @abstractmethod
    def whole_weight(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's master weights, whole, float32 where they are trained. All ranks have to call it. The
        result may be the live tensor: copy what is to be kept."""

    @abstractmethod
    def part(self, parameter: nn.Parameter, kind: str) -> Part | None:
        """What this rank has of the parameter's master `weight`, or of AdamW's `exp_avg` or `exp_avg_sq`: the live
        tensor. None for nothing."""

    @abstractmethod
    def restore(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Set `weight` and, of a trained parameter, both moments, from whole tensors on the CPU. All ranks have to
        call it, and a step has to have been done before, so that there is an optimizer state to set."""

    @abstractmethod
    def _optimizer_states(self) -> list[dict[str, Any]]:
        """The dictionaries of the innermost optimizer that hold moments and steps."""

    def set_step_count(self, count: int) -> None:
        """Make AdamW's bias correction that of `count` steps done."""
        for state in self._optimizer_states():
            state["step"].fill_(float(count))

    def loss_scale_state(self) -> dict[str, float]:
        """What float16's loss scaler remembers; empty in other precisions."""
        return {}

    def restore_loss_scale(self, state: dict[str, float]) -> None:
        """Undo `loss_scale_state`. What another precision or engine has left is not used."""
        return

    @abstractmethod
    def bytes_per_parameter(self, world_size: int) -> float:
        """Memory that weights, gradients and optimizer states take on one device, in bytes per weight of the whole
        model: the accounting of Rajbhandari et al. 2020, section 3.1, in float32 without the low-precision copy."""

    def plain_model(self) -> nn.Module:
        """The model without what it was wrapped in; its parameters may be shards."""
        if self._plain is None:
            self._plain = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return self._plain
