"""Windows of question and context that a model can read, with the positions of the answer in them.

Contexts repeat (in SQuAD some five questions share one), so every distinct question and context is encoded
once, and the windows are cut from the arrays. The result equals the tokenizer's own overflowing windows, id for
id and offset for offset.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from qa_dist.errors import UserError, listing
from qa_dist.tasks.question_answering.characters import span_of_whole_characters
from qa_dist.tasks.question_answering.data import Example
from qa_dist.tasks.question_answering.layout import PairTemplate
from qa_dist.tasks.ragged import Ragged, distinct, ranges
from qa_dist.tasks.task import Batch
from qa_dist.tasks.windows import Windows, cut_windows

WINDOWS_PER_CHUNK = 20_000
"""Windows assembled at a time; bounds the memory that building features needs beside the result."""
LONGEST_SPACE = 16
"""Spaces that one token of a vocabulary may stand for."""
CHARACTERS_PER_TEXT = 2**32
"""Offset between the character positions of two contexts when all are searched as one array."""


class NoRoomError(UserError):
    """Questions that leave no room for their contexts."""

    def __init__(self, message: str, places: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], longest: int):
        super().__init__(message)
        self.places = places
        """Positions of their examples."""
        self.lengths = lengths
        """Their tokens."""
        self.longest = longest
        """Tokens that a question may have."""


@dataclass(frozen=True)
class EncodedTexts:
    """Distinct texts as tokens, without special tokens."""

    ids: Ragged
    """Token ids of each text."""
    starts: npt.NDArray[np.int64]
    """First character of every token, in its own text; laid out as `ids.values`."""
    ends: npt.NDArray[np.int64]
    """One past the last character of every token."""


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, whole_words: bool = False) -> EncodedTexts:
    """`whole_words`: a token's characters are those of the word that it is a part of."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    lengths = np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int64)
    total = int(lengths.sum())
    values = np.fromiter((i for ids in encoded["input_ids"] for i in ids), dtype=np.int32, count=total)
    offsets = np.fromiter(
        (place for row in encoded["offset_mapping"] for pair in row for place in pair),
        np.int64,
        count=2 * total,
    ).reshape(-1, 2)
    if whole_words:
        words = [-1 if word is None else word for part in encoded.encodings or () for word in part.word_ids]
        offsets = _of_whole_words(offsets, np.array(words, dtype=np.int64), np.repeat(np.arange(len(texts)), lengths))
    return EncodedTexts(Ragged.from_lengths(values, lengths), offsets[:, 0], offsets[:, 1])


def _without_spaces(texts: Sequence[str], encoded: EncodedTexts, tokenizer: PreTrainedTokenizerBase) -> EncodedTexts:
    """Return `encoded` with tokens that are nothing but a space holding no character.

    SentencePiece's tokenizers put a "▁" before a word. Where it stays a token of its own, its offsets are those of the
    word's first character, which the next token holds.
    """
    spaces: Any = tokenizer.convert_tokens_to_ids(["▁" * count for count in range(1, LONGEST_SPACE + 1)])
    spaces = [token for token in spaces if token not in (None, tokenizer.unk_token_id)]
    ends = encoded.ends.copy()
    places = np.flatnonzero(np.isin(encoded.ids.values, spaces))
    owners = np.searchsorted(encoded.ids.offsets, places, side="right") - 1
    for place, owner in zip(places.tolist(), owners.tolist(), strict=True):
        text = str(texts[owner])[int(encoded.starts[place]) : int(ends[place])]
        if not text.isspace() and "▁" not in text:
            ends[place] = encoded.starts[place]
    return replace(encoded, ends=ends)


def _of_whole_words(
    offsets: npt.NDArray[np.int64], words: npt.NDArray[np.int64], owner: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """`offsets` [tokens, 2] widened from the first character of each token's word to the last; tokens of word -1
    belong to none. `owner` is each token's text, whose words are counted from 0."""
    if not len(words):
        return offsets
    is_first = (words != np.roll(words, 1)) | (owner != np.roll(owner, 1)) | (words < 0)
    is_first[:1] = True
    first = np.flatnonzero(is_first)
    last = np.append(first[1:], len(words)) - 1
    word = np.cumsum(is_first) - 1
    return np.stack((offsets[first, 0][word], offsets[last, 1][word]), axis=1)


def build_features(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stride: int,
    whole_words: bool = False,
    causal: bool = False,
) -> pa.Table:
    """Return one row per window of every example, in order. `causal` decides the layout (`PairTemplate.of`).

    Columns: `example` (position in `examples`), `input_ids` and, where the model reads them, `token_type_ids`
    (without padding), `context_begin` and `context_end` (the window's context tokens, as positions in
    `input_ids`), `cls` (position of the token that stands for "no answer": the classification token, or the last one),
    `start_position` and `end_position` (first and last token of the answer; both `cls` where the window does not hold
    it whole), `char_starts` and `char_ends` (characters of each context token, in the context; with `whole_words` those
    of the token's word).

    Raises `NoRoomError` when a question leaves no room for its context.
    """
    template = PairTemplate.of(tokenizer, causal=causal)
    # blanks before a question are no part of it: some tokenizers would make tokens of them
    question_rows, questions = distinct([example.question.lstrip() for example in examples])
    context_rows, contexts = distinct([example.context for example in examples])
    encoded_questions = encode(questions, tokenizer)
    encoded_contexts = encode(contexts, tokenizer, whole_words=whole_words)
    question_lengths = encoded_questions.ids.lengths[question_rows]
    context_lengths = encoded_contexts.ids.lengths[context_rows]
    room = max_length - template.num_special - question_lengths
    has_no_room = (room < 1) | ((context_lengths > room) & (room <= stride))
    _require_room(examples, question_lengths, has_no_room, max_length, stride, template)

    owner, begin, end = cut_windows(context_lengths, room, stride)
    first, last = _answer_tokens(examples, context_rows, _without_spaces(contexts, encoded_contexts, tokenizer))
    held = (first[owner] >= begin) & (last[owner] < end)

    tables = []
    for chunk in np.array_split(np.arange(len(owner)), -(-len(owner) // WINDOWS_PER_CHUNK)):
        question, context = question_rows[owner[chunk]], context_rows[owner[chunk]]
        source = encoded_contexts.ids.offsets[context] + begin[chunk]
        size = end[chunk] - begin[chunk]
        asked, read = encoded_questions.ids, encoded_contexts.ids
        ids, types, context_begin = _assemble(template, asked, question, read, source, size)
        cls = template.no_answer + (ids.lengths if template.no_answer < 0 else np.zeros_like(ids.lengths))
        shift, tokens = context_begin - begin[chunk], ranges(source, size)
        columns = {
            "example": pa.array(owner[chunk].astype(np.int32)),
            "input_ids": ids.to_arrow(),
            "context_begin": pa.array(context_begin.astype(np.int32)),
            "context_end": pa.array((context_begin + size).astype(np.int32)),
            "cls": pa.array(cls.astype(np.int32)),
            "start_position": pa.array(np.where(held[chunk], first[owner[chunk]] + shift, cls).astype(np.int32)),
            "end_position": pa.array(np.where(held[chunk], last[owner[chunk]] + shift, cls).astype(np.int32)),
            "char_starts": Ragged.from_lengths(encoded_contexts.starts[tokens].astype(np.int32), size).to_arrow(),
            "char_ends": Ragged.from_lengths(encoded_contexts.ends[tokens].astype(np.int32), size).to_arrow(),
        }
        if "token_type_ids" in tokenizer.model_input_names:
            columns["token_type_ids"] = types.to_arrow()
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def _require_room(
    examples: Sequence[Example],
    question_lengths: npt.NDArray[np.int64],
    too_long: npt.NDArray[np.bool_],
    max_length: int,
    stride: int,
    template: PairTemplate,
) -> None:
    if not too_long.any():
        return
    places = np.flatnonzero(too_long)
    worst = [f"{examples[int(i)].id!r} ({question_lengths[i]:,} tokens)" for i in places]
    most = max(max_length - template.num_special - stride - 1, 0)
    message = (
        f"{len(places):,} questions leave no room for their context: {listing(worst)}. With data.max_length "
        f"{max_length} and data.stride {stride} a question may have {most} tokens: shorten the questions, raise "
        "data.max_length or lower data.stride"
    )
    raise NoRoomError(message, places, question_lengths[places], most)


def _answer_tokens(
    examples: Sequence[Example], context_rows: npt.NDArray[np.int64], contexts: EncodedTexts
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and last token (in the whole context) that the example's first usable answer touches.

    Where there is none, first is -1, so that no window holds it. Shapes: [num_examples] each.
    """
    spans = np.full((len(examples), 2), -1, dtype=np.int64)
    for i, example in enumerate(examples):
        for text, start in zip(example.answers, example.answer_starts, strict=True):
            if start >= 0:
                # what is blank at the edges may belong to no token, or to one beside the answer
                begin, end = span_of_whole_characters(example.context, start, start + len(text))
                if begin < end:
                    spans[i] = begin, end
                break
    # One search over all contexts: shift the characters of each context into a range of its own. The running
    # maximum keeps the order where a tokenizer gives several tokens the same characters.
    lengths = contexts.ids.lengths
    base = np.repeat(np.arange(len(lengths)) * CHARACTERS_PER_TEXT, lengths)
    ends = np.maximum.accumulate(contexts.ends + base) if len(base) else base
    starts = np.maximum.accumulate(contexts.starts + base) if len(base) else base
    own = context_rows * CHARACTERS_PER_TEXT
    offset = contexts.ids.offsets[context_rows]
    first = np.searchsorted(ends, spans[:, 0] + own, side="right") - offset
    last = np.searchsorted(starts, spans[:, 1] + own, side="left") - 1 - offset
    nothing = (spans[:, 0] < 0) | (last < first) | (first >= lengths[context_rows])
    first, last = np.where(nothing, -1, first), np.where(nothing, -1, last)
    _leave_out_shared(examples, spans, first, last, contexts, offset)
    return first, last


def _leave_out_shared(
    examples: Sequence[Example],
    spans: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    last: npt.NDArray[np.int64],
    contexts: EncodedTexts,
    offset: npt.NDArray[np.int64],
) -> None:
    """Move `first` and `last` off tokens that the answer shares with a letter beside it, where it begins or ends within
    another token all the same.

    A token of a byte-level tokenizer may hold the last bytes of one letter and the first of the next; the next token
    then holds the rest of that letter. `offset` is where each example's context begins among the tokens. Shapes:
    `spans` [num_examples, 2], the others [num_examples].
    """
    known = np.flatnonzero((first >= 0) & (first < last))
    at_first, at_last = (offset + first)[known], (offset + last)[known]
    begin, end = spans[known].T
    early = (contexts.starts[at_first] < begin) & (contexts.starts[at_first + 1] == begin)
    late = (contexts.ends[at_last] > end) & (contexts.ends[at_last - 1] == end)
    moves = np.zeros((2, len(known)), dtype=np.int64)
    for side, places, token, step in ((0, early, at_first, 1), (1, late, at_last, -1)):
        for k in np.flatnonzero(places).tolist():
            one, other = token[k], token[k] + step
            beside = slice(contexts.starts[one], begin[k]) if step > 0 else slice(end[k], contexts.ends[one])
            is_letter = bool(examples[known[k]].context[beside].strip())  # not the space that a token begins with
            moves[side, k] = is_letter and contexts.starts[other] < contexts.ends[other]
    # an answer of two tokens that are both shared keeps both: each holds a part of it
    fits = first[known] + moves[0] <= last[known] - moves[1]
    first[known] += moves[0] * fits
    last[known] -= moves[1] * fits


def _assemble(
    template: PairTemplate,
    questions: Ragged,
    question: npt.NDArray[np.int64],
    contexts: Ragged,
    source: npt.NDArray[np.int64],
    size: npt.NDArray[np.int64],
) -> tuple[Ragged, Ragged, npt.NDArray[np.int64]]:
    """Put windows together: token ids, token types, and where the context begins in each.

    `question` is each window's row in `questions`; its context tokens are the `size` ones from `source` on in
    `contexts.values`. Shapes: [windows] each.
    """
    question_part = (questions.values, questions.offsets[question], questions.lengths[question])
    context_part = (contexts.values, source, size)
    texts = [question_part, context_part] if template.question_first else [context_part, question_part]
    lengths = template.num_special + question_part[2] + size
    ids = Ragged.from_lengths(np.empty(int(lengths.sum()), dtype=np.int32), lengths)
    types = Ragged.from_lengths(np.empty(len(ids.values), dtype=np.int8), lengths)
    place = ids.offsets[:-1].copy()
    context_begin = np.zeros(len(size), dtype=np.int64)
    for part in range(3):
        for token, token_type in zip(template.ids[part], template.types[part], strict=True):
            ids.values[place], types.values[place] = token, token_type
            place += 1
        if part < 2:
            values, begin, length = texts[part]
            if values is contexts.values:
                context_begin = place - ids.offsets[:-1]
            target = ranges(place, length)
            ids.values[target] = values[ranges(begin, length)]
            types.values[target] = template.text_types[part]
            place += length
    return ids, types, context_begin


class QuestionAnsweringFeatures(Windows[Example]):
    """Windows with the positions of their answers, ready to be collated."""

    def __init__(self, columns: pa.Table, *args: Any, **kwargs: Any):
        """`columns` are those of `build_features`; the other arguments those of `Windows`."""
        super().__init__(columns, *args, **kwargs)
        self.char_starts = Ragged.from_arrow(columns.column("char_starts"))
        self.char_ends = Ragged.from_arrow(columns.column("char_ends"))
        self.scalars = {
            name: columns.column(name).to_numpy().astype(np.int64)
            for name in ("context_begin", "context_end", "cls", "start_position", "end_position")
        }
        """Positions in each window, without padding, [num_features] each."""

    def target_arrays(self) -> list[npt.NDArray[Any]]:
        return list(self.scalars.values())

    def example_id(self, example: Example) -> str:
        return example.id

    def expected(self, example: Example) -> tuple[str, tuple[str, ...]]:
        return example.context, example.answers

    def summary(self) -> dict[str, str]:
        examples = self.examples().items
        answers = [len(example.answers) for example in examples]
        unanswerable = answers.count(0)
        about_answers = {
            "unanswerable": f"{unanswerable:,} ({unanswerable / len(examples):.0%})",
            "answers per question": f"{sum(answers) / len(examples):.2f}",
        }
        return {
            "examples": f"{len(examples):,}",
            "contexts": f"{len({example.context for example in examples}):,}",
            **(about_answers if self.labelled else {}),
            **self.token_summary(),
        }

    def collate(self, indices: npt.NDArray[np.integer], multiple: int = 8) -> Batch:
        """The windows at `indices`; the targets are positions in the padded rows."""
        inputs, begin = self.padded(indices, multiple)
        targets = {name: torch.from_numpy(values[indices] + begin) for name, values in self.scalars.items()}
        return Batch(inputs, targets, torch.from_numpy(np.asarray(indices, dtype=np.int64)))
