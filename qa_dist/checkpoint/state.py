"""The state of a training run as named tensors, the same whichever engine holds it.

For every trained parameter its float32 master weights and AdamW's two moments; for the others their weights; and the
model's buffers. Names are `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and `buffer/NAME`, NAME being the plain
model's.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's first and second moment, under PyTorch's names."""


class Spread(Protocol):
    """A model spread over processes. Every method but the first has to be called by all of them, in the same order."""

    def plain_model(self) -> nn.Module:
        """The model without what it is wrapped in; its parameters may be shards."""
        ...

    def whole_weight(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's master weights, whole; possibly the live tensor."""
        ...

    def whole_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """One of `MOMENTS` of a trained parameter, whole; possibly the live tensor."""
        ...

    def restore(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Set `weight` and the moments of a parameter from whole tensors on the CPU."""
        ...


def full_weights(spread: Spread, is_main: bool) -> dict[str, Tensor] | None:
    """The model's whole weights by name, float32, on the CPU: the master weights where training keeps a copy in
    low precision. On the main process; None on the others, all of which must call it too."""
    model = spread.plain_model()
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = spread.whole_weight(parameter)
        if is_main:
            weights[name] = tensor.to("cpu", torch.float32, copy=True)
    if not is_main:
        return None
    # names that belong to the state but not to the parameters: buffers, and tied weights under a second name
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in weights:
            continue
        shared = next((n for n, p in model.named_parameters() if p is tensor), None)
        weights[name] = weights[shared] if shared else tensor.detach().cpu()
    return weights


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of the state."""
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor behind
        for kind in ("weight", *(MOMENTS if parameter.requires_grad else ())):
            found[f"{kind}/{name}"] = shape
    return found | {f"buffer/{name}": tuple(buffer.shape) for name, buffer in _buffers(model)}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the model's state; others, such as position ids, are made anew."""
    kept = model.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def owners(sizes: Mapping[str, tuple[int, ...]], world_size: int) -> dict[str, int]:
    """Which rank keeps and writes each tensor, so that all have about as many bytes: the largest first, each to the
    rank that has least so far."""
    loads = [0] * world_size
    found: dict[str, int] = {}
    for name, shape in sorted(sizes.items(), key=lambda item: (-torch.Size(item[1]).numel(), item[0])):
        rank = loads.index(min(loads))
        loads[rank] += torch.Size(shape).numel()
        found[name] = rank
    return found


class HostCopies:
    """This rank's share of the state in host memory, in buffers that are kept from one checkpoint to the next: 12 bytes
    per weight and rank, divided by the number of ranks."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.world_size = world_size
        self.tensors: dict[str, Tensor] = {}

    def capture(self, spread: Spread) -> dict[str, Tensor]:
        """Copy the state as it is now. All ranks have to call it."""
        model = spread.plain_model()
        owner = owners(shapes(model), self.world_size)
        on_gpu = False
        for name, parameter in model.named_parameters():
            kinds = ("weight", *(MOMENTS if parameter.requires_grad else ()))
            for kind in kinds:
                whole = spread.whole_weight(parameter) if kind == "weight" else spread.whole_moment(parameter, kind)
                on_gpu |= whole.is_cuda
                if owner[f"{kind}/{name}"] == self.rank:
                    self._copy(f"{kind}/{name}", whole, torch.float32)
        for name, buffer in _buffers(model):
            if owner[f"buffer/{name}"] == self.rank:
                self._copy(f"buffer/{name}", buffer, buffer.dtype)
        if on_gpu:
            torch.cuda.synchronize()
        return self.tensors

    def _copy(self, name: str, source: Tensor, dtype: torch.dtype) -> None:
        if name not in self.tensors:
            self.tensors[name] = torch.empty(source.shape, dtype=dtype, pin_memory=source.is_cuda)
        self.tensors[name].copy_(source, non_blocking=True)


def restore(spread: Spread, read: Callable[[str], Tensor]) -> None:
    """Set the whole state from `read`, which gives a tensor by its name, on all ranks alike."""
    model = spread.plain_model()
    for name, parameter in model.named_parameters():
        kinds = ("weight", *(MOMENTS if parameter.requires_grad else ()))
        spread.restore(parameter, {kind: read(f"{kind}/{name}") for kind in kinds})
    for name, buffer in _buffers(model):
        buffer.copy_(read(f"buffer/{name}"))
