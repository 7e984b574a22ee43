"""The state of a live engine as named tensors, whichever engine it is."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn


def full_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor] | None:
    """The model's whole weights by name, float32, on the CPU: the master weights where training keeps a copy in
    low precision. On the main process; None on the others, all of which must call it too."""
    is_main = accelerator.is_main_process
    plain: Any = accelerator.unwrap_model(model, keep_torch_compile=False)
    weights: dict[str, Tensor] = {}
    for name, parameter in plain.named_parameters():
        whole = _whole(accelerator, parameter)
        if is_main:
            weights[name] = whole
    if not is_main:
        return None
    # names that belong to the state but not to the parameters: buffers, and tied weights under a second name
    for name, tensor in plain.state_dict(keep_vars=True).items():
        if name in weights:
            continue
        shared = next((n for n, p in plain.named_parameters() if p is tensor), None)
        weights[name] = weights[shared] if shared else tensor.detach().cpu()
    return weights


def _whole(accelerator: Accelerator, parameter: nn.Parameter) -> Tensor:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if (whole := safe_get_full_fp32_param(parameter)) is not None:
            return whole.detach().to("cpu", torch.float32, copy=True)
        if hasattr(parameter, "ds_id"):  # ZeRO-3 shards what is not trained too, without a master copy
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().to("cpu", torch.float32, copy=True)
    return parameter.detach().to("cpu", torch.float32, copy=True)
