"""How a model is spread over processes: whole on each (DDP), by DeepSpeed ZeRO, or by PyTorch's FSDP2.

A strategy wraps a model and updates it. What differs between the three ends here.
"""

import contextlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

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
    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's master weights, float32, whole, on the CPU. All ranks have to call it."""

    @abstractmethod
    def bytes_per_parameter(self, world_size: int) -> float:
        """Memory that weights, gradients and optimizer states take on one device, in bytes per weight of the whole
        model: the accounting of Rajbhandari et al. 2020, section 3.1, in float32 without the low-precision copy."""

    def plain_model(self) -> nn.Module:
        """The model without what it was wrapped in; its parameters may be shards."""
        plain: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return plain


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

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().to("cpu", torch.float32, copy=True)

    def bytes_per_parameter(self, world_size: int) -> float:
        buckets = 4 if world_size > 1 else 0  # DDP's own copy of the gradients
        return 4 + 4 + 8 + buckets


class DeepSpeed(Strategy):
    """ZeRO (Rajbhandari et al. 2020): optimizer states, gradients (2) and weights (3) divided among the processes."""

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        plugin = accelerator.deepspeed_plugin
        assert plugin is not None
        self.plugin = plugin
        self.stage = int(plugin.zero_stage)
        self.name = f"DeepSpeed ZeRO-{self.stage}"
        self.casts_weights = accelerator.mixed_precision in ("bf16", "fp16")
        self.exchanges_every_micro_batch = self.stage >= 2

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        # The batches are ours: DeepSpeed only multiplies these numbers. Accumulation is controlled by the boundary
        # set in backward(), and losses arrive scaled, so it must not divide them again.
        config = self.plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = 1
        config["gradient_accumulation_steps"] = 1
        config["train_batch_size"] = self.accelerator.num_processes
        config["gradient_clipping"] = self.max_grad_norm  # without any it would step on infinities in float32
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model))

    @property
    def engine(self) -> Any:
        wrapped = self.accelerator.deepspeed_engine_wrapped
        assert wrapped is not None
        return wrapped.engine

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: Tensor) -> None:
        # not accelerator.backward, which would step as well
        self.engine.backward(loss)

    def update(self) -> Update:
        engine = self.engine
        half = self.accelerator.mixed_precision == "fp16"
        own_norm = None
        if self.stage == 0 and not self.casts_weights:  # DeepSpeed clips without saying the norm, and never skips
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            own_norm = float(nn.utils.get_total_norm(gradients))
            if not math.isfinite(own_norm):
                raise NonFiniteGradientError
        skipped_before = engine.skipped_steps
        engine.step()
        norm = float(engine.get_global_grad_norm() or 0.0) if own_norm is None else own_norm
        skipped = engine.skipped_steps > skipped_before
        if not half and (skipped or not math.isfinite(norm)):
            raise NonFiniteGradientError
        return Update(norm, skipped, self._loss_scale() if half else None)

    def _loss_scale(self) -> float:
        optimizer = self.engine.optimizer  # of a different class for each stage
        return float(optimizer.cur_scale if hasattr(optimizer, "cur_scale") else optimizer.loss_scale)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if (whole := safe_get_full_fp32_param(parameter)) is not None:
            return whole.detach().to("cpu", torch.float32, copy=True)
        if hasattr(parameter, "ds_id"):  # ZeRO-3 shards what is not trained too, without a master copy
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().to("cpu", torch.float32, copy=True)
        return parameter.detach().to("cpu", torch.float32, copy=True)

    def bytes_per_parameter(self, world_size: int) -> float:
        weights, gradients, states = (2, 2, 12) if self.casts_weights else (4, 4, 8)
        offloads = self.plugin.offload_optimizer_device not in (None, "none")
        return (
            weights / (world_size if self.stage >= 3 else 1)
            + gradients / (world_size if self.stage >= 2 else 1)
            + (0 if offloads else states / (world_size if self.stage >= 1 else 1))
        )


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
        offloads = _flag("FSDP_OFFLOAD_PARAMS", default=False)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (self.accelerator.num_processes,)),
            "reshard_after_forward": _flag("FSDP_RESHARD_AFTER_FORWARD", default=True),
            "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy() if offloads else OffloadPolicy(),
        }
        if not offloads:
            model.to(device)
        for layer in transformer_layers(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)  # in place
        self.model = model
        if offloads:
            for buffer in model.buffers():
                buffer.data = buffer.data.to(device)
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

    def whole(self, parameter: nn.Parameter) -> Tensor:
        data: Any = parameter.detach()
        if isinstance(data, DTensor):
            if self.accelerator.device.type != "cpu":
                data = data.to(self.accelerator.device)  # an offloaded shard has to travel over the device's network
            data = data.full_tensor()
        return data.to("cpu", torch.float32, copy=True)

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


def strategy_for(accelerator: Accelerator, use_fsdp: bool) -> Strategy:
    """The strategy that the launch config names."""
    if accelerator.deepspeed_plugin is not None:
        return DeepSpeed(accelerator)
    if use_fsdp and accelerator.num_processes > 1 and dist.is_initialized():
        return FullyShardedDataParallel(accelerator)
    return DataParallel(accelerator)
