"""What a new model is tried out on before it is trained: single windows, with and without padding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qa_dist.tasks.windows import padding_of

TRIAL_TOKENS = 64
"""Most tokens of a trial window: more than the blocks in which models with sparse attention look at a text."""
TOLERANCE = 1e-4
"""Of the largest logit: far more than rounding, which is about 1e-6 of it, and less than padding changes the logits of
models that depend on it."""


def trial_tokens(tokenizer: PreTrainedTokenizerBase, count: int, shift: int = 0) -> list[int]:
    """Return ids of `count` ordinary tokens from all over the vocabulary. With another `shift` each is another one."""
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    step = max(len(ordinary) // (count + 1), 1)
    return [ordinary[(i * step + shift) % len(ordinary)] for i in range(count)]


def trial_logits(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[tuple[int, int]], padding: int = 0
) -> Tensor:
    """Return what `model` gives for each of `tokens` (pairs of a token and its type) as a window of its own, with so
    many tokens of padding on the tokenizer's side: [tokens, logits]."""
    columns = {"input_ids": [token for token, _ in tokens], "token_type_ids": [kind for _, kind in tokens]}
    columns = {name: row for name, row in columns.items() if name in tokenizer.model_input_names}
    fill = padding_of(tokenizer) | {"attention_mask": 0}
    left = tokenizer.padding_side == "left"
    inputs = {}
    for name, row in (columns | {"attention_mask": [1] * len(tokens)}).items():
        rest = [fill[name]] * padding
        inputs[name] = torch.tensor([rest + row if left else row + rest])
    with torch.no_grad():
        output: Any = model(**inputs)
    own = slice(padding, None) if left else slice(len(tokens))
    return torch.cat([v[0, own].reshape(len(tokens), -1).float() for k, v in output.items() if "logits" in k], dim=1)


def padding_notes(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[tuple[int, int]], max_length: int
) -> list[str]:
    """Return a note for the user where padding changes the logits that `model` gives for `tokens`; else none."""
    padding = min(len(tokens), max_length - len(tokens))
    if padding < 1:
        return []
    alone, padded = (trial_logits(model, tokenizer, tokens, count) for count in (0, padding))
    change = float((alone - padded).abs().max() / alone.abs().max().clamp(min=1e-30))
    if change <= TOLERANCE:
        return []
    return [
        f"its outputs depend on padding ({padding} tokens of it change the logits of a window of {len(tokens)} by up "
        f"to {change:.2%} of the largest), so its figures depend on which windows share a batch: on batch sizes, and "
        "on the number of processes"
    ]
