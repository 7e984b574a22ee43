"""Windows of words that a model can read, with a label at the first token of every word.

A word is cut into tokens by itself, so every distinct word is encoded once, and the windows are put together from the
arrays. The result equals that of the tokenizer, called with `is_split_into_words`, token for token.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qa_dist.errors import UserError, listing
from qa_dist.tasks.ragged import Ragged, distinct, ranges
from qa_dist.tasks.task import Batch
from qa_dist.tasks.token_classification.data import Example
from qa_dist.tasks.token_classification.scheme import entities_of
from qa_dist.tasks.windows import Windows, cut_windows

IGNORED = -100
"""The label of tokens that have none: special ones, and all tokens of a word but the first."""


@dataclass(frozen=True)
class TextTemplate:
    """How a tokenizer lays out a single text: special tokens before and behind it."""

    before: tuple[tuple[int, int], ...]
    behind: tuple[tuple[int, int], ...]
    """Each a token and its type."""
    text_type: int
    """Token type of the text itself."""

    @property
    def num_special(self) -> int:
        return len(self.before) + len(self.behind)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TextTemplate":
        """Read the layout off a probe."""
        probe = tokenizer("a", return_token_type_ids=True, verbose=False)
        tokens = list(zip(probe["input_ids"], probe["token_type_ids"], strict=True))
        own = [i for i, sequence in enumerate(probe.sequence_ids(0)) if sequence == 0]
        return cls(tuple(tokens[: own[0]]), tuple(tokens[own[-1] + 1 :]), tokens[own[0]][1])


def words_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have byte-level tokenizers take a word by itself for one in a text: with the space before it, which is a part of
    the token there (as transformers asks for with `add_prefix_space`)."""
    plain: Any = tokenizer
    state = json.loads(plain.backend_tokenizer.to_str())
    first = state["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    if not any(step.get("type") == "ByteLevel" and not step["add_prefix_space"] for step in steps):
        return
    if len(steps) > 1:  # a step before has cut the word, so that each of its parts would get a space
        own = [state["normalizer"]] if state["normalizer"] else []
        state["normalizer"] = {"type": "Sequence", "normalizers": [*own, {"type": "Prepend", "prepend": " "}]}
    else:
        steps[0]["add_prefix_space"] = True
        if "add_prefix_space" in (state["post_processor"] or {}):
            state["post_processor"]["add_prefix_space"] = True
    plain._tokenizer = Tokenizer.from_str(json.dumps(state))
    plain.add_prefix_space = True


def encode_words(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Ragged:
    """Token ids of each word, without special tokens; words of nothing but what the tokenizer drops have none."""
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    found = backend.encode_batch_fast([[word] for word in words], is_pretokenized=True, add_special_tokens=False)
    lengths = np.array([len(one.ids) for one in found], dtype=np.int64)
    values = np.fromiter((i for one in found for i in one.ids), dtype=np.int32, count=int(lengths.sum()))
    return Ragged.from_lengths(values, lengths)


def _room(template: TextTemplate, max_length: int) -> int:
    """Return the most tokens of a text that a window holds. Raises `UserError` where there are none."""
    room = max_length - template.num_special
    if room < 1:
        raise UserError(
            f"data.max_length: {max_length} leaves no room beside the {template.num_special} special tokens of a "
            "window; raise it"
        )
    return room


def build_features(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str] | None,
    *,
    max_length: int,
    stride: int,
    lenient: bool = False,
) -> pa.Table:
    """One row per window of every example, in order; neighbouring windows share `stride` tokens.

    Columns: `example` (position in `examples`), `input_ids` and, where the model reads them, `token_type_ids` (without
    padding), `word` (the word that begins with the token, as its position in the example; -1 for other tokens), `label`
    (its place in `labels`; `IGNORED` for other tokens, or without `labels`), `begin` and `end` (the window's own
    tokens, without special ones, as positions in `input_ids`).

    Raises `UserError` for labels of examples that are not among `labels`, unless `lenient`: then their words are
    `IGNORED`. Raises it for windows that hold nothing, too.
    """
    template = TextTemplate.of(tokenizer)
    room = _room(template, max_length)
    offsets, ids, word, label = _tokens(examples, tokenizer, labels, lenient)
    lengths = np.diff(offsets)
    if room <= stride and (lengths > room).any():
        raise UserError(
            f"data.stride: {stride} tokens that neighbouring windows share leave no room for others in windows of "
            f"data.max_length {max_length} with {template.num_special} special tokens; lower it"
        )
    owner, begin, end = cut_windows(lengths, np.full_like(lengths, room), stride)
    size = end - begin
    source = ranges(offsets[owner] + begin, size)
    shape = np.concatenate([[0], np.cumsum(size + template.num_special)])
    first = shape[:-1] + len(template.before)
    target = ranges(first, size)

    def put(fill: int, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        result = np.full(int(shape[-1]), fill, dtype=values.dtype)
        result[target] = values[source]
        return result

    input_ids = put(0, ids)
    types = np.full(len(input_ids), template.text_type, dtype=np.int8)
    for i, special in enumerate(template.before):
        input_ids[shape[:-1] + i], types[shape[:-1] + i] = special
    for i, special in enumerate(template.behind):
        input_ids[first + size + i], types[first + size + i] = special
    columns = {
        "example": pa.array(owner.astype(np.int32)),
        "input_ids": Ragged(input_ids, shape).to_arrow(),
        "word": Ragged(put(-1, word), shape).to_arrow(),
        "label": Ragged(put(IGNORED, label), shape).to_arrow(),
        "begin": pa.array(np.full(len(owner), len(template.before), dtype=np.int32)),
        "end": pa.array((size + len(template.before)).astype(np.int32)),
    }
    if "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = Ragged(types, shape).to_arrow()
    return pa.table(columns)


def _tokens(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] | None, lenient: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int16]]:
    """The tokens of all examples in a row: where those of each example begin, [examples + 1]; ids, words and labels as
    in the columns of `build_features`, [tokens]."""
    counts = np.array([len(example.words) for example in examples], dtype=np.int64)
    rows, words = distinct([word for example in examples for word in example.words])
    encoded = encode_words(words, tokenizer)
    per_word = encoded.lengths[rows]
    ids = encoded.values[ranges(encoded.offsets[rows], per_word)].astype(np.int32)
    borders = np.concatenate([[0], np.cumsum(per_word)])
    has_any = per_word > 0
    begins = borders[:-1][has_any]
    word, label = np.full(len(ids), -1, dtype=np.int32), np.full(len(ids), IGNORED, dtype=np.int16)
    word[begins] = ranges(np.zeros(len(examples), dtype=np.int64), counts)[has_any]
    if labels is not None:
        label[begins] = _label_ids(examples, labels, lenient)[has_any]
    return borders[np.concatenate([[0], np.cumsum(counts)])], ids, word, label


def _label_ids(examples: Sequence[Example], labels: Sequence[str], lenient: bool) -> npt.NDArray[np.int16]:
    """Return the labels of all words of all examples. Raises `UserError` for those that are not among `labels`, unless
    `lenient`: they are `IGNORED`."""
    places = {label: i for i, label in enumerate(labels)}
    if not lenient and (found := unknown_labels(examples, labels)):
        raise UserError(
            f"there are labels that are not among those to be told apart: {found}. Those are "
            f"{listing(labels, limit=30)}: of the trained model, of data.labels, or of the training examples. Correct "
            "the tags, or name all labels with data.labels"
        )
    return np.array([places.get(label, IGNORED) for example in examples for label in example.labels], dtype=np.int16)


def unknown_labels(examples: Sequence[Example], labels: Sequence[str]) -> str:
    """Return, for a message, the labels of `examples` that are not among `labels`, and where they are; "" for none."""
    known = set(labels)
    strangers: dict[str, list[str]] = {}
    for example in examples:
        for label in set(example.labels).difference(known):
            strangers.setdefault(label, []).append(example.where(example.labels.index(label)))
    return "; ".join(f"{label!r} ({listing(where, limit=2)})" for label, where in sorted(strangers.items()))


class TokenClassificationFeatures(Windows[Example]):
    """Windows with the labels of their words, ready to be collated."""

    def __init__(self, columns: pa.Table, *args: Any, labels: Sequence[str] | None = None, **kwargs: Any):
        """`columns` are those of `build_features`; `labels` those that a model tells apart, None where they do not
        matter; the other arguments those of `Windows`."""
        self.known_labels = labels
        super().__init__(columns, *args, **kwargs)
        self.word = Ragged.from_arrow(columns.column("word"))
        """Position of the word that begins with each token, or -1."""
        self.label = Ragged.from_arrow(columns.column("label"))
        self.begin, self.end = (columns.column(name).to_numpy().astype(np.int64) for name in ("begin", "end"))
        """Where the windows' tokens that are not special begin and end, [num_features]."""

    def target_arrays(self) -> list[npt.NDArray[Any]]:
        return [self.label.values]

    def example_id(self, example: Example) -> str:
        return example.id

    def expected(self, example: Example) -> tuple[str, tuple[str, ...]]:
        return "\n".join(example.words), example.labels

    @property
    def notes(self) -> list[str]:
        lost = int((self.word_tokens < 0).sum())
        notes = [*super().notes]
        if lost:
            notes.append(f"{lost:,} words have no token, so no entity is found in them")
        if self.known_labels and (found := unknown_labels(self.examples().items, self.known_labels)):
            notes.append(f"the model does not know these labels, so their entities count as missed: {found}")
        return notes

    def word_counts(self) -> npt.NDArray[np.int64]:
        """Words of each example."""
        return np.array([len(example.words) for example in self.examples().items], dtype=np.int64)

    @cached_property
    def word_tokens(self) -> npt.NDArray[np.int64]:
        """For each word of all examples, in order, the token that its label is read from, as a place among the tokens
        of all windows; -1 for a word that has no token.

        Of two windows that hold the word, that one in which it is farther from the nearer edge.
        """
        offsets = np.concatenate([[0], np.cumsum(self.word_counts())])
        token = np.flatnonzero(self.word.values >= 0)
        window = np.repeat(np.arange(len(self)), self.lengths)[token]
        position = token - self.word.offsets[window]
        context = np.minimum(position - self.begin[window], self.end[window] - 1 - position)
        word = offsets[self.example[window]] + self.word.values[token]
        order = np.lexsort((window, -context, word))
        result = np.full(int(offsets[-1]), -1, dtype=np.int64)
        result[word[order][::-1]] = token[order][::-1]  # of those for one word, the first is put last
        return result

    def summary(self) -> dict[str, str]:
        examples = self.examples().items
        words = int(self.word_counts().sum())
        found: dict[str, int] = {}
        for example in examples if self.labelled else []:
            for entity in entities_of(example.labels):
                found[entity.type] = found.get(entity.type, 0) + 1
        by_type = ", ".join(f"{name} {count:,}" for name, count in sorted(found.items()))
        return {
            "examples": f"{len(examples):,}",
            "words": f"{words:,}",
            **({"entities": f"{sum(found.values()):,}", "of each type": by_type} if self.labelled else {}),
            **self.token_summary(),
        }

    def collate(self, indices: npt.NDArray[np.integer], multiple: int = 8) -> Batch:
        """The windows at `indices`; the target is the label of each token, `IGNORED` where it has none."""
        inputs, begin = self.padded(indices, multiple)
        width = next(iter(inputs.values())).shape[1]
        targets = {"label": torch.from_numpy(self.label.padded(indices, begin, width, IGNORED))}
        return Batch(inputs, targets, torch.from_numpy(np.asarray(indices, dtype=np.int64)))
