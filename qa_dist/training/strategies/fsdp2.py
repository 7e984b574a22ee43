"""PyTorch's FSDP2."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from qa_dist.checkpoint.state import MOMENTS, Part
from qa_dist.training.strategies.base import MakeOptimizer, NonFiniteGradientError, Strategy, Update


class FullyShardedDataParallel(Strategy):
    """PyTorch's FSDP2 (Zhao et al. 2023), layer by layer: weights, gradients and optimizer states divided.

    PyTorch's own `fully_shard` rather than Accelerate's use of it, which does not exist on CPUs.
    """

    name = "FSDP2"
    exchanges_every_micro_batch = True

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        self.casts_weights = accelerator.mixed_precision == "bf16"

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        device = self.accelerator.device
        low = torch.bfloat16 if self.casts_weights else None
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (self.accelerator.num_processes,)),
            "reshard_after_forward": _flag("FSDP_RESHARD_AFTER_FORWARD", default=True),
            "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32),
        }
        model.to(device)
        for layer in transformer_layers(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)  # in place
        self.model = model
        self.optimizer = make_optimizer(self.model)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> Update:
        norm_ = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        norm = float(norm_.full_tensor() if isinstance(norm_, DTensor) else norm_)
        if not math.isfinite(norm):
            raise NonFiniteGradientError
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Update(norm)

    def whole_weight(self, parameter: nn.Parameter) -> Tensor:
        return self._whole(parameter.detach())

    def part(self, parameter: nn.Parameter, kind: str) -> Part | None:
        tensor = parameter.detach() if kind == "weight" else self.optimizer.state[parameter][kind]
        if not isinstance(tensor, DTensor):
            return Part(tensor)
        # fully_shard divides the first dimension as torch.chunk does
        rows = -(-tensor.shape[0] // tensor.device_mesh.size())
        local = tensor.to_local()
        start = tensor.device_mesh.get_local_rank() * rows * math.prod(tensor.shape[1:])
        return Part(local.flatten(), start) if local.numel() else None

    def _whole(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        return tensor.full_tensor()

    def restore(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        self._set(parameter.data, values["weight"])
        if parameter.requires_grad:
            for name in MOMENTS:
                self._set(self.optimizer.state[parameter][name], values[name])

    @staticmethod
    def _set(target: Tensor, whole: Tensor) -> None:
        if not isinstance(target, DTensor):
            target.copy_(whole)
            return
        # every rank has the whole and cuts its own part out
        shard = distribute_tensor(
            whole.to(target.device_mesh.device_type), target.device_mesh, target.placements, src_data_rank=None
        )
        target.to_local().copy_(shard.to_local())

    def _optimizer_states(self) -> list[dict[str, Any]]:
        return list(self.optimizer.state.values())

    def plain_model(self) -> nn.Module:
        return self.model

    def bytes_per_parameter(self, world_size: int) -> float:
        return (4 + 4 + 8) / world_size


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: the members of its module lists, outermost lists only."""
    layers: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                layers.extend(child)
            else:
                visit(child)

    visit(model)
    return layers


def _flag(name: str, default: bool) -> bool:
    """A yes or no that Accelerate's launcher has put into the environment."""
    return os.environ.get(name, str(default)).strip().lower() in ("true", "1", "yes")
