"""How question and context are laid out in a window, and which of its tokens stands for "no answer"."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qa_dist.errors import UserError

END_TOKENS = ("eos_token_id", "sep_token_id", "cls_token_id", "bos_token_id")
"""Special tokens that can be put behind a pair, the first that there is."""


@dataclass(frozen=True)
class PairTemplate:
    """The layout of a pair of texts: special tokens before, between and behind them."""

    ids: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """Special tokens before the first text, between the two, and behind the second."""
    types: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """Token types of those special tokens."""
    text_types: tuple[int, int]
    """Token types of the first and of the second text."""
    question_first: bool
    """Whether the question is the first text."""
    no_answer: int
    """Place of the special token that stands for "no answer": from the window's start, or from its end if negative."""

    @property
    def num_special(self) -> int:
        return sum(len(part) for part in self.ids)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, causal: bool = False) -> "PairTemplate":
        """Read the layout off a pair that `tokenizer` encodes.

        "No answer" is the classification token, or else the token that begins a sequence, where the pair has one.
        Where it has none, and where tokens see only those before them (`causal`), it is the last token: the special
        token that ends the pair, or one that is added. Causal models get the question first, so that the context can
        depend on it; for others the context comes first where the tokenizer pads on the left.

        Raises `UserError` for a tokenizer that does not encode pairs, or has no special token to put at the end.
        """
        flags: Any = {"return_token_type_ids": True, "return_special_tokens_mask": True}
        probe = tokenizer("a", "a", **flags, verbose=False)
        tokens, owners = list(zip(probe["input_ids"], probe["token_type_ids"], strict=True)), probe.sequence_ids(0)
        first, second = sorted([i for i, owner in enumerate(owners) if owner == text] for text in (0, 1))
        is_special = [owner is None for owner in owners] == [mask == 1 for mask in probe["special_tokens_mask"]]
        whole = all(span and span[-1] - span[0] < len(span) for span in (first, second))
        if not whole or not is_special:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path!r} does not encode pairs of texts")
        parts = [tokens[: first[0]], tokens[first[-1] + 1 : second[0]], tokens[second[-1] + 1 :]]
        text_types = tokens[first[0]][1], tokens[second[0]][1]
        markers = () if causal else (tokenizer.cls_token_id, tokenizer.bos_token_id)
        no_answer = next((place for marker in markers if (place := _place_of(marker, parts)) is not None), -1)
        if no_answer == -1 and not parts[2]:
            parts[2].append((_end_token(tokenizer), text_types[1]))
        given_first = owners.index(0) == first[0]  # a post-processor may put the second text first
        ids: Any = tuple(tuple(token for token, _ in part) for part in parts)
        types: Any = tuple(tuple(kind for _, kind in part) for part in parts)
        question_first = causal or (tokenizer.padding_side == "right") == given_first
        return cls(ids, types, text_types, question_first, no_answer)

    def window(self, question: list[int], context: list[int]) -> tuple[list[tuple[int, int]], slice]:
        """Return a window's tokens with their types, and where the context is among them."""
        texts = [question, context] if self.question_first else [context, question]
        parts = [list(zip(ids, types, strict=True)) for ids, types in zip(self.ids, self.types, strict=True)]
        first, second = ([(token, kind) for token in text] for text, kind in zip(texts, self.text_types, strict=True))
        begin = len(parts[0]) + (len(first) + len(parts[1]) if self.question_first else 0)
        return parts[0] + first + parts[1] + second + parts[2], slice(begin, begin + len(context))


def _place_of(marker: Any, parts: list[list[tuple[int, int]]]) -> int | None:
    """Return where `marker` stands before the texts, or behind them (counted from the end); None if it does not."""
    before, _, behind = ([token for token, _ in part] for part in parts)
    if marker in before:
        return before.index(marker)
    return behind.index(marker) - len(behind) if marker in behind else None


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for name in END_TOKENS:
        token: Any = getattr(tokenizer, name)
        if token is not None:
            return token
    raise UserError(
        f"the tokenizer of {tokenizer.name_or_path!r} puts no special token behind question and context, and has none "
        'that can stand there for "no answer"; give it an eos_token (in its tokenizer_config.json) that is in its '
        "vocabulary"
    )
