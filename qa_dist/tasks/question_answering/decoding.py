"""From start and end logits to answers, for all windows of all examples at once.

The best `n_best` starts and ends of every window are paired; a pair is an answer if it lies in the context, ends
where it starts or later, and is not longer than `max_answer_length` tokens. Its score is the sum of the two
logits (Devlin et al. 2019, section 4.2). The answers of an example are the best over all its windows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures
from qa_dist.tasks.ragged import ranges

PAIRS_PER_CHUNK = 100_000
"""Candidate pairs held in memory at a time, over all windows of a chunk."""


def candidates(
    start_logits: Tensor,
    end_logits: Tensor,
    context_begin: Tensor,
    context_end: Tensor,
    cls: Tensor,
    n_best: int,
) -> dict[str, Tensor]:
    """Reduce each window's logits to its best starts and ends, on the device where they are.

    Shapes: logits [features, length]; `context_begin`, `context_end`, `cls` [features]. Returns `start_logit`,
    `start_index`, `end_logit`, `end_index`, each [features, n_best] (logit -inf where the context has fewer
    tokens), and `null_score` [features], the score of the classification token. Indices count from the window's
    first context token, so that they do not depend on where the batch was padded. Among equal logits the earlier
    token comes first.
    """
    features, length = start_logits.shape
    places = torch.arange(length, device=start_logits.device)
    outside = (places < context_begin[:, None]) | (places >= context_end[:, None])
    rows = torch.arange(features, device=start_logits.device)
    null_score = start_logits[rows, cls].float() + end_logits[rows, cls].float()
    logits = torch.stack((start_logits, end_logits)).float().masked_fill_(outside, -torch.inf)
    # `topk` promises nothing about the order of equal values, and a stable sort of whole rows takes twice as long: so
    # `topk` of integers, no two of them equal, that are ordered as the logits are, and then by place.
    bits = logits.add_(0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0, which it equals
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE 754: read as integers, negative floats are ordered backwards
    keys = (ordered.long() << 32) + places.flip(0)
    count = min(n_best, length)
    if keys.device.type == "cpu":  # NumPy's partition has vector instructions, and takes a quarter of the time
        best = torch.from_numpy(np.partition(keys.numpy(), length - count, axis=2)[:, :, length - count :])
        best = best.sort(dim=2, descending=True).values
    else:
        best = keys.topk(count, dim=2).values
    index = length - 1 - (best & 0xFFFFFFFF)
    missing = (0, max(n_best - length, 0))
    values = F.pad(logits.gather(2, index), missing, value=-torch.inf)
    index = F.pad(index - context_begin[:, None], missing).int()
    return {
        "start_logit": values[0],
        "start_index": index[0],
        "end_logit": values[1],
        "end_index": index[1],
        "null_score": null_score,
    }


@dataclass(frozen=True)
class Answers:
    """The answers of all examples, best first within each example; arrays of shape [num_answers]."""

    example: npt.NDArray[np.int64]
    """Position of the example; ascending."""
    feature: npt.NDArray[np.int64]
    """Window that the answer was found in."""
    start_char: npt.NDArray[np.int64]
    end_char: npt.NDArray[np.int64]
    """The answer is `context[start_char:end_char]`."""
    start_logit: npt.NDArray[np.float32]
    end_logit: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]
    """Sum of the two logits."""
    null_score: npt.NDArray[np.float32]
    """Score of "no answer": the lowest over the example's windows, [num_examples]."""


def decode(
    outputs: dict[str, npt.NDArray[Any]],
    features: QuestionAnsweringFeatures,
    num_examples: int,
    *,
    n_best: int,
    max_answer_length: int,
) -> Answers:
    """Find each example's `n_best` best answers. `outputs` are the `candidates` of all features.

    An answer that two overlapping windows both hold counts once, with its higher score.
    """
    chunk = max(1, PAIRS_PER_CHUNK // n_best**2)
    parts = [
        _window_answers(outputs, slice(at, at + chunk), n_best, max_answer_length)
        for at in range(0, len(features), chunk)
    ]
    feature, start, end, start_logit, end_logit = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    score = start_logit + end_logit
    example = features.example[feature].astype(np.int64)
    # tokens of the window's context -> characters of the context
    shift = features.char_starts.offsets[feature]
    start_char = features.char_starts.values[start + shift].astype(np.int64)
    end_char = features.char_ends.values[end + shift].astype(np.int64)

    # Best first within each example; the order of windows and of their answers decides between equal ones. Most
    # examples have one window, whose answers are in order already: timsort passes over them.
    order = np.argsort((example << 32) + _descending(score), kind="stable")
    # The same answer from several windows: keep the first, which is the best.
    kept = np.delete(order, repeated(example[order], start_char[order], end_char[order]))
    counts = np.bincount(example[kept], minlength=num_examples)
    rank = ranges(np.zeros(num_examples, dtype=np.int64), counts)
    kept = kept[rank < n_best]

    null_score = np.full(num_examples, np.inf, dtype=np.float32)
    np.minimum.at(null_score, features.example, outputs["null_score"])
    return Answers(
        example[kept],
        feature[kept],
        start_char[kept],
        end_char[kept],
        start_logit[kept],
        end_logit[kept],
        score[kept],
        null_score,
    )


def _descending(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """32-bit integers in the opposite order of `scores`; equal where those are equal."""
    bits = (scores + np.float32(0)).view(np.int32)  # + 0: -0.0 becomes 0.0, which it equals
    # IEEE 754: read as integers, negative floats are ordered backwards
    return (~(bits ^ ((bits >> 31) & 0x7FFFFFFF))).astype(np.int64)


def repeated(*columns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Places of rows that an earlier row equals in all `columns`."""
    if not len(columns[0]):
        return columns[0]
    key = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:  # wraps around: equal rows have equal keys, and nearly all others different ones
        key = (key + column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    ordered = np.sort(key)
    suspects = np.flatnonzero(np.isin(key, ordered[1:][ordered[1:] == ordered[:-1]]))
    rows = np.stack([column[suspects] for column in columns])
    order = np.lexsort(rows)  # stable: equal rows stay in their order
    equal = (rows[:, order[1:]] == rows[:, order[:-1]]).all(axis=0)
    return suspects[order[1:][equal]]


def _window_answers(
    outputs: dict[str, npt.NDArray[Any]], rows: slice, n_best: int, max_answer_length: int
) -> tuple[npt.NDArray[Any], ...]:
    """The best `n_best` valid pairs of each window: feature, start and end token, start and end logit."""
    start, end = outputs["start_index"][rows], outputs["end_index"][rows]
    start_logit, end_logit = outputs["start_logit"][rows], outputs["end_logit"][rows]
    length = end[:, None, :] - start[:, :, None]  # less one
    score = start_logit[:, :, None] + end_logit[:, None, :]
    valid = (length.view(np.uint32) < max_answer_length) & (score > -np.inf)
    # keys that hold score and place sort faster than places by score, and no two are equal
    pairs = start.shape[1] * end.shape[1]
    keys = (_descending(score) << 32).reshape(-1, pairs) + np.arange(pairs)
    keys[~valid.reshape(-1, pairs)] = np.iinfo(np.int64).max
    best = np.partition(keys, min(n_best, pairs) - 1, axis=1)[:, :n_best]
    best.sort(axis=1)
    row, column = np.nonzero(best < np.iinfo(np.int64).max)
    pair = best[row, column] & 0xFFFFFFFF
    s, e = pair // end.shape[1], pair % end.shape[1]
    return row + rows.start, start[row, s], end[row, e], start_logit[row, s], end_logit[row, e]
