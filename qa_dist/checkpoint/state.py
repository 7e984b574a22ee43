"""The state of a training run as named tensors, the same whichever engine holds it.

For every trained parameter its float32 master weights and AdamW's two moments; for the others their weights; and the
model's buffers. Names are `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and `buffer/NAME`, NAME being the plain
model's. A rank that holds only a part of a tensor stores it flat, as `weight/NAME:START`, START being its place in the
whole: saving needs no communication.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's first and second moment, under PyTorch's names."""


class Part(NamedTuple):
    """What one rank has of a tensor; the live one, so copy what is to be kept."""

    tensor: Tensor
    """The whole tensor in its shape, or a flat piece of it."""
    start: int | None = None
    """Place of a piece in the flat whole; None for the whole, which then all ranks have."""


class Spread(Protocol):
    """A model spread over processes."""

    def plain_model(self) -> nn.Module:
        """The model without what it is wrapped in; its parameters may be shards."""
        ...

    def whole_weight(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's master weights, whole; possibly the live tensor. All ranks have to call it."""
        ...

    def part(self, parameter: nn.Parameter, kind: str) -> Part | None:
        """What this rank has of the parameter's master `weight`, or of one of its `MOMENTS`; None for nothing."""
        ...

    def restore(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Set `weight` and the moments of a parameter from whole tensors on the CPU. All ranks have to call it."""
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
    """Which rank keeps and writes each tensor that all ranks have, so that all write about as many bytes: the largest
    first, each to the rank that has least so far."""
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
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name -> shape of all tensors; known once some have been copied."""
        self._owners: dict[str, int] = {}
        self._from_gpu = False

    def capture(self, spread: Spread) -> dict[str, Tensor]:
        """Copy this rank's share of the state as it is now."""
        model = spread.plain_model()
        if not self.shapes:
            self.shapes = shapes(model)
            self._owners = owners(self.shapes, self.world_size)
        owner, copies = self._owners, _Copies()
        for name, parameter in model.named_parameters():
            for kind in ("weight", *(MOMENTS if parameter.requires_grad else ())):
                key, part = f"{kind}/{name}", spread.part(parameter, kind)
                if part is None or (part.start is None and owner[key] != self.rank):
                    continue
                own = key if part.start is None else f"{key}:{part.start}"
                copies.add(self._buffer(own, part.tensor, torch.float32), part.tensor)
        for name, buffer in _buffers(model):
            if owner[f"buffer/{name}"] == self.rank:
                copies.add(self._buffer(f"buffer/{name}", buffer, buffer.dtype), buffer)
        copies.make()
        if self._from_gpu:
            torch.cuda.synchronize()
        return self.tensors

    def _buffer(self, name: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = torch.empty(source.shape, dtype=dtype, pin_memory=source.is_cuda)
            self._from_gpu |= source.is_cuda
        return self.tensors[name]


class _Copies:
    """Copies to be made all at once."""

    def __init__(self) -> None:
        self.targets: list[Tensor] = []
        self.sources: list[Tensor] = []

    def add(self, target: Tensor, source: Tensor) -> None:
        self.targets.append(target)
        self.sources.append(source.detach())

    def make(self) -> None:
        if self.targets:
            copy: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            copy(self.targets, self.sources, non_blocking=True)


def restore(spread: Spread, read: Callable[[str], Tensor]) -> None:
    """Set the whole state from `read`, which gives a tensor by its name, on all ranks alike."""
    model = spread.plain_model()
    for name, parameter in model.named_parameters():
        kinds = ("weight", *(MOMENTS if parameter.requires_grad else ()))
        spread.restore(parameter, {kind: read(f"{kind}/{name}") for kind in kinds})
    for name, buffer in _buffers(model):
        buffer.copy_(read(f"buffer/{name}"))
