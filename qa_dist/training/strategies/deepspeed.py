"""DeepSpeed ZeRO."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qa_dist.checkpoint.state import Part
from qa_dist.training.strategies.base import MakeOptimizer, NonFiniteGradientError, Strategy, Update

BUCKET_VALUES = 500_000_000
"""DeepSpeed's default size of the bucket in which gradients are reduced."""
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scaler remembers."""


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
        self._is_linked = False
        self._masters: dict[nn.Parameter, nn.Parameter] = {}

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        # The batches are ours: DeepSpeed only multiplies these numbers. Accumulation is controlled by the boundary
        # set in backward(), and losses arrive scaled, so it must not divide them again.
        config = self.plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = 1
        config["gradient_accumulation_steps"] = 1
        config["train_batch_size"] = self.accelerator.num_processes
        config["gradient_clipping"] = self.max_grad_norm  # without any it would step on infinities in float32
        # With offloading, Accelerate would replace AdamW by DeepSpeed's own. That one multiplies powers of the betas
        # from step to step, but computes them anew after a jump of the step count: a resumed run would differ.
        config["zero_force_ds_cpu_optimizer"] = False
        # DeepSpeed allocates the bucket whole. Its default takes 2 GB in float32, also beside a model of 90 MB.
        values = sum(parameter.numel() for parameter in model.parameters())
        config["zero_optimization"].setdefault("reduce_bucket_size", min(values, BUCKET_VALUES))
        optimizer = make_optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # until the first step sets it
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad and self.casts_weights]
        exact = [parameter.detach().to(torch.float32, copy=True) for parameter in trained]
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        # DeepSpeed makes the master weights from weights that it has rounded to low precision before
        for parameter, whole in zip(trained, exact, strict=True):
            self._set(parameter, "weight", whole)
        self.set_step_count(0)  # in stage 0 and low precision DeepSpeed has done a step without gradients

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

    def whole_weight(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage == 0:
            return self._master(parameter).detach()
        if parameter.requires_grad and (whole := safe_get_full_fp32_param(parameter)) is not None:
            return whole.detach()
        if hasattr(parameter, "ds_id"):  # ZeRO-3 shards what is not trained too, without a master copy
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter.detach()

    def part(self, parameter: nn.Parameter, kind: str) -> Part | None:
        if self.stage == 3:
            return self._part_of_stage_3(parameter, kind)
        if self.stage == 0 or not parameter.requires_grad:
            master = self._master(parameter) if self.stage == 0 else parameter
            return Part(master.detach() if kind == "weight" else self._plain_optimizer().state[master][kind])
        self._link_moments()
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # this rank's partition does not reach into the parameter
            return None
        piece = mapping.get_hp_fragment(None if kind == "weight" else kind)
        return Part(piece.flatten(), mapping.lp_fragment_address.start)

    def _part_of_stage_3(self, parameter: nn.Parameter, kind: str) -> Part | None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        stored: Any = parameter
        if not parameter.requires_grad:
            piece = stored.ds_tensor
        elif kind == "weight":
            piece = safe_get_local_fp32_param(parameter)
        else:
            piece = safe_get_local_optimizer_state(parameter, kind)
        assert piece is not None
        start, count = self._partition(parameter)
        return Part(piece.detach().flatten()[:count], start) if count else None

    def _partition(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return where this rank's partition under ZeRO-3 starts in the flat parameter, and how many elements of the
        parameter it holds. All partitions have the same size, so the last ones may be padded, or be padding alone."""
        stored: Any = parameter
        start = self.accelerator.process_index * stored.ds_tensor.ds_numel
        return start, max(min(stored.ds_tensor.ds_numel, stored.ds_numel - start), 0)

    def _link_moments(self) -> None:
        """Tell stages 1 and 2 where each parameter's moments lie. DeepSpeed does so itself after the first parameter
        group's first step, when the other groups have none yet."""
        optimizer = self.engine.optimizer
        if self._is_linked or not hasattr(optimizer, "single_partition_of_fp32_groups"):
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state as link

        for group, partition in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            link(group, partition, optimizer.optimizer.state)
        self._is_linked = True

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return what PyTorch's optimizer updates for a parameter that is not divided: in low precision, if it is
        trained, a float32 copy of it, else the parameter itself."""
        if not self._masters and self.casts_weights:
            optimizer = self.engine.optimizer
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                self._masters |= dict(zip(low, high, strict=True))
        return self._masters.get(parameter, parameter)

    def restore(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        # the weights that the forward pass sees; in low precision they are a copy of the master weights
        stored: Any = parameter
        if self.stage == 3:
            stored.ds_tensor.data.copy_(self._own(parameter, values["weight"]))
        if self.stage < 3 or parameter.numel() == stored.ds_numel:  # small parameters are also kept gathered
            parameter.data.copy_(values["weight"])
        if parameter.requires_grad:
            self._link_moments()
            for kind, whole in values.items():
                self._set(parameter, kind, whole)

    def _set(self, parameter: nn.Parameter, kind: str, whole: Tensor) -> None:
        """Set the master weights or a moment of a trained parameter."""
        from deepspeed import utils

        if self.stage == 0:
            master = self._master(parameter)
            target = master.data if kind == "weight" else self._plain_optimizer().state[master][kind]
            target.copy_(whole)
        elif self.stage == 3:
            # The functions that take whole tensors know nothing of padding: they fail where the number of ranks does
            # not divide the parameter's size.
            own = self._own(parameter, whole)
            if kind == "weight":
                utils.safe_set_local_fp32_param(parameter, own)
            else:
                utils.safe_set_local_optimizer_state(parameter, own, kind)
        elif kind == "weight":
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, kind)

    def _own(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """Return this rank's partition of a whole tensor under ZeRO-3, with its padding."""
        stored: Any = parameter
        start, count = self._partition(parameter)
        piece = whole.new_zeros(stored.ds_tensor.ds_numel)
        piece[:count] = whole.flatten()[start : start + count]
        return piece

    def _optimizer_states(self) -> list[dict[str, Any]]:
        return list(self._plain_optimizer().state.values())

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Return PyTorch's optimizer, which DeepSpeed wraps."""
        optimizer = self.engine.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def loss_scale_state(self) -> dict[str, float]:
        scaler = self._scaler()
        return {name: getattr(scaler, name) for name in SCALER_STATE if hasattr(scaler, name)}

    def restore_loss_scale(self, state: dict[str, float]) -> None:
        scaler = self._scaler()
        for name in SCALER_STATE:
            if scaler is not None and name in state:
                setattr(scaler, name, state[name])

    def _scaler(self) -> Any:
        if self.accelerator.mixed_precision != "fp16":
            return None
        return getattr(self.engine.optimizer, "loss_scaler", None)

    def bytes_per_parameter(self, world_size: int) -> float:
        weights, gradients, states = (2, 2, 12) if self.casts_weights else (4, 4, 8)
        offloads = self.plugin.offload_optimizer_device not in (None, "none")
        return (
            weights / (world_size if self.stage >= 3 else 1)
            + gradients / (world_size if self.stage >= 2 else 1)
            + (0 if offloads else states / (world_size if self.stage >= 1 else 1))
        )
