"""The whole model on every process."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qa_dist.checkpoint.state import MOMENTS, Part
from qa_dist.training.strategies.base import MakeOptimizer, NonFiniteGradientError, Strategy, Update


class DataParallel(Strategy):
    """The whole model on every process, gradients averaged: DDP, or a process alone."""

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self.name = "DDP" if accelerator.num_processes > 1 else "no sharding"

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model))

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.accelerator.sync_gradients = last
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def update(self) -> Update:
        norm_ = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        assert norm_ is not None
        norm, scaler = float(norm_), self.accelerator.scaler
        if scaler is None and not math.isfinite(norm):
            raise NonFiniteGradientError
        self.optimizer.step()
        self.optimizer.zero_grad()
        if scaler is None:
            return Update(norm)
        return Update(norm, self.accelerator.optimizer_step_was_skipped, scaler.get_scale())

    def whole_weight(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def part(self, parameter: nn.Parameter, kind: str) -> Part | None:
        return Part(parameter.detach() if kind == "weight" else self._plain_optimizer().state[parameter][kind])

    def restore(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        parameter.data.copy_(values["weight"])
        if parameter.requires_grad:
            state = self._plain_optimizer().state[parameter]
            for name in MOMENTS:
                state[name].copy_(values[name])

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        wrapped: Any = self.optimizer
        return wrapped.optimizer

    def _optimizer_states(self) -> list[dict[str, Any]]:
        return list(self._plain_optimizer().state.values())

    def loss_scale_state(self) -> dict[str, float]:
        scaler = self.accelerator.scaler
        return dict(scaler.state_dict()) if scaler is not None else {}

    def restore_loss_scale(self, state: dict[str, float]) -> None:
        if self.accelerator.scaler is not None and "scale" in state:
            self.accelerator.scaler.load_state_dict(state)

    def bytes_per_parameter(self, world_size: int) -> float:
        buckets = 4 if world_size > 1 else 0  # DDP's own copy of the gradients
        return 4 + 4 + 8 + buckets
