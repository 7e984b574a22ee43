"""Attention without padding: the windows of a batch laid end to end, as one long row.

Every token is real, so nothing is computed for padding, and attention stays within each window. On NVIDIA GPUs
PyTorch's variable-length flash attention does the work (Dao 2023); a plain implementation of the same signature
defines what it has to give, and is what tests compare with padded models on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from qa_dist.tasks.task import Batch

NAME = "qa_dist_varlen"
"""Under which transformers knows the attention below."""

FAMILIES = frozenset(("bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "roberta", "xlm-roberta"))
"""Model types whose attention transformers lets us replace, and whose positions are learned for each place."""

ROBERTA_LIKE = frozenset(("camembert", "data2vec-text", "roberta", "xlm-roberta"))
"""Those that count positions from behind the padding token's id."""


@dataclass
class Packed(Batch):
    """A batch whose windows are also laid end to end. `inputs` are the padded ones: the loss looks at their mask."""

    packed_inputs: dict[str, Tensor]
    """Arguments of the model's forward pass: `input_ids`, `position_ids` and the like [1, tokens], and the windows'
    borders `cu_seq_lens` int32 [features + 1], from 0."""
    places: Tensor
    """Where each token stands in the padded rows, flattened, int64, [tokens]."""
    longest: int
    """Tokens of the longest window."""

    @property
    def positions(self) -> int:
        return self.places.numel()


def packed(batch: Batch, first_position: int) -> Packed:
    """`batch`, padded on either side, with its windows laid end to end; positions count from `first_position`."""
    real = batch.inputs["attention_mask"].bool()
    lengths = real.sum(dim=1)
    borders = F.pad(lengths.cumsum(0), (1, 0))
    position = torch.arange(int(borders[-1])) - torch.repeat_interleave(borders[:-1], lengths)
    inputs = {name: rows[real][None] for name, rows in batch.inputs.items() if name != "attention_mask"}
    inputs["position_ids"] = (position + first_position)[None]
    inputs["cu_seq_lens"] = borders.to(torch.int32)
    places = real.flatten().nonzero()[:, 0]
    return Packed(batch.inputs, batch.targets, batch.index, inputs, places, int(lengths.max()))


def run_model(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch on its device; every tensor of it [features, length, …], packed or not."""
    if not isinstance(batch, Packed):
        return model(**batch.inputs)
    output = model(**batch.packed_inputs, longest_window=batch.longest)
    rows, width = batch.inputs["attention_mask"].shape
    tokens = batch.places.numel()

    def padded(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != (1, tokens):
            return value
        flat = value.new_zeros(rows * width, *value.shape[2:])
        return flat.index_copy(0, batch.places, value[0]).view(rows, width, *value.shape[2:])

    return ModelOutput({name: padded(value) for name, value in output.items()})


# ------------------------------------------------------------------------------------------------ attention

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None], Tensor]
"""(query, key, value [tokens, heads, size], borders [windows + 1], longest window, scale) -> [tokens, heads, size]."""


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float | None
) -> Tensor:
    """softmax(q k^T scale) v within each window (Vaswani et al. 2017), window by window."""
    windows = []
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        q, k, v = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        windows.append(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1))
    return torch.cat(windows)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float | None
) -> Tensor:
    """The same on an NVIDIA GPU, in bf16 or fp16."""
    from torch.nn.attention.varlen import varlen_attn

    result = varlen_attn(query, key, value, borders, borders, longest, longest, scale=scale)
    assert isinstance(result, Tensor)
    return result


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens: Tensor | None = None,
    longest_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' form of it: query, key and value are [1, heads, tokens, size], the result [1, tokens, heads, size].
    Dropout of attention weights, which the kernel does not have, is left out."""
    if cu_seq_lens is None or longest_window is None:
        raise RuntimeError("a model with packed attention was called on a batch that is not packed")
    kernel: Kernel = flash_attention if query.is_cuda else reference_attention
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    return kernel(q, k, v, cu_seq_lens, longest_window, scaling)[None], None


# -------------------------------------------------------------------------------------------- switching it on


def obstacle(model: nn.Module, device: torch.device, mixed_precision: str) -> str | None:
    """Why `model` cannot use packed attention here; None if it can."""
    config: Any = model.config
    if config.model_type not in FAMILIES:
        return f"models of type {config.model_type!r} cannot use it; " + ", ".join(sorted(FAMILIES)) + " can"
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return f"position_embedding_type {config.position_embedding_type!r} needs positions that it does not have"
    if device.type != "cuda" or torch.version.cuda is None:
        return "it needs an NVIDIA GPU"
    if mixed_precision not in ("bf16", "fp16"):
        return "it needs mixed_precision bf16 or fp16 in the launch config"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is too old for it; it needs compute capability 8.0"
    return None


def switch_on(model: nn.Module) -> int:
    """Make `model`, of one of the `FAMILIES`, compute attention on packed windows. Returns the first position."""
    from transformers import AttentionInterface

    plain: Any = model
    AttentionInterface.register(NAME, _attention)
    plain.set_attn_implementation(NAME)
    return (plain.config.pad_token_id or 0) + 1 if plain.config.model_type in ROBERTA_LIKE else 0
