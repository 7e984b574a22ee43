"""The state of a training run as named tensors, the same whichever engine holds it.

For every trained parameter its float32 master weights and AdamW's two moments; for the others their weights; and the
model's buffers. Names are `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and `buffer/NAME`, NAME being the plain
model's. A rank that holds only a part of a tensor stores it flat, as `weight/NAME:START`, START being its place in the
whole: saving needs no communication.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qa_dist.checkpoint.manifest import Dtype, TensorSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's first and second moment, under PyTorch's names."""
DTYPES: dict[torch.dtype, Dtype] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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


def tensor_specs(model: nn.Module) -> dict[str, TensorSpec]:
    """Return name -> element type and shape of all tensors of the state."""
    found: dict[str, TensorSpec] = {}
    for name, parameter in model.named_parameters():
        shape = list(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor behind
        for kind in ("weight", *(MOMENTS if parameter.requires_grad else ())):
            found[f"{kind}/{name}"] = TensorSpec(dtype="F32", shape=shape)
    for name, buffer in _buffers(model):
        found[f"buffer/{name}"] = TensorSpec(dtype=DTYPES[buffer.dtype], shape=list(buffer.shape))
    return found


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold an infinity or a NaN, at the cost of reading each value once.

    A sum that is finite proves that all values are; only where it is not are the values looked at one by one.
    """
    suspects = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.sum().isfinite()]
    return [name for name in suspects if not tensors[name].isfinite().all()]


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the model's state; others, such as position ids, are made anew."""
    kept = model.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def owners(specs: Mapping[str, TensorSpec], world_size: int) -> dict[str, int]:
    """Return which rank keeps and writes each tensor that all ranks have, so that all write about as many bytes: the
    largest first, each to the rank that has least so far."""
    loads = [0] * world_size
    found: dict[str, int] = {}
    sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        rank = loads.index(min(loads))
        loads[rank] += size
        found[name] = rank
    return found


class HostCopies:
    """This rank's share of the state in host memory, in buffers that are kept from one checkpoint to the next: 12 bytes
    per weight and rank, divided by the number of ranks."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.world_size = world_size
        self.tensors: dict[str, Tensor] = {}
        self.specs: dict[str, TensorSpec] = {}
        """Name -> element type and shape of all tensors; known once some have been copied."""
        self._owners: dict[str, int] = {}
        self._from_gpu = False

    def capture(self, spread: Spread) -> dict[str, Tensor]:
        """Copy this rank's share of the state as it is now."""
        model = spread.plain_model()
        if not self.specs:
            self.specs = tensor_specs(model)
            self._owners = owners(self.specs, self.world_size)
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
