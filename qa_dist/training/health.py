"""Is the run healthy: how fast, how wasteful, how full is the device."""

import resource
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

PEAK_FLOPS = {
    # name in torch.cuda.get_device_name -> dense bf16/fp16 tensor-core FLOP/s, and TF32's, from NVIDIA's data sheets
    "B200": (2250e12, 1125e12),
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "L4": (121e12, 60e12),
    "A10": (125e12, 62.5e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """The device's peak FLOP/s at the precision of its matrix products; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for known, peaks in PEAK_FLOPS.items() if known in name), None)
    return peaks[0 if mixed_precision in ("bf16", "fp16") else 1] if peaks else None


@dataclass(frozen=True)
class FlopsPerWindow:
    """Floating-point operations of training on a window: forward and backward, without padding or recomputation.

    The count of Chowdhery et al. 2022 (PaLM), appendix B: for each token 6 times the weights that multiply it, and
    12 x layers x hidden size x length for attention.
    """

    weights: int
    """Parameters without embeddings."""
    attention: int
    """Layers times hidden size."""

    @classmethod
    def of(cls, model: nn.Module) -> "FlopsPerWindow | None":
        """None for models that do not say their shape, or use their weights several times."""
        config: Any = getattr(model, "config", None)
        layers, hidden = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
        if not isinstance(layers, int) or not isinstance(hidden, int) or getattr(config, "model_type", "") == "albert":
            return None
        embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
        return cls(sum(p.numel() for p in model.parameters()) - embeddings, layers * hidden)

    def __call__(self, lengths: npt.NDArray[np.integer]) -> float:
        """Of windows with `lengths` tokens, together."""
        tokens = lengths.astype(np.float64)
        return float((6 * self.weights * tokens + 12 * self.attention * tokens**2).sum())


def peak_memory(device: torch.device) -> float:
    """Most memory that this process has held so far, in GiB: of the device, or on a CPU of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
