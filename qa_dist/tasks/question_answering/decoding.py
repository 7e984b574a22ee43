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
from torch import Tensor

from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures
from qa_dist.tasks.question_answering.features import span_of_whole_characters as span_of_whole_characters
from qa_dist.tasks.ragged import ranges

PAIRS_PER_CHUNK = 1_600_000
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
    result: dict[str, Tensor] = {}
    rows = torch.arange(features, device=start_logits.device)
    for name, logits in (("start", start_logits.float()), ("end", end_logits.float())):
        values, index = torch.sort(logits.masked_fill(outside, -torch.inf), dim=1, descending=True, stable=True)
        missing = max(n_best - length, 0)
        result[f"{name}_logit"] = torch.nn.functional.pad(values[:, :n_best], (0, missing), value=-torch.inf)
        index = index[:, :n_best] - context_begin[:, None]
        result[f"{name}_index"] = torch.nn.functional.pad(index, (0, missing)).int()
    result["null_score"] = start_logits[rows, cls].float() + end_logits[rows, cls].float()
    return result


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

    # The same answer from several windows: keep the best. Sorting is stable, so the earlier window wins a tie.
    order = np.lexsort((-score, end_char, start_char, example))
    key = np.stack([example, start_char, end_char])[:, order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (key[:, 1:] != key[:, :-1]).any(axis=0)
    kept = np.sort(order[new])
    # Best first within each example, at most n_best of them.
    kept = kept[np.lexsort((-score[kept], example[kept]))]
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


def _window_answers(
    outputs: dict[str, npt.NDArray[Any]], rows: slice, n_best: int, max_answer_length: int
) -> tuple[npt.NDArray[Any], ...]:
    """The best `n_best` valid pairs of each window: feature, start and end token, start and end logit."""
    start, end = outputs["start_index"][rows], outputs["end_index"][rows]
    start_logit, end_logit = outputs["start_logit"][rows], outputs["end_logit"][rows]
    length = end[:, None, :] - start[:, :, None] + 1
    score = start_logit[:, :, None] + end_logit[:, None, :]
    score = np.where((length >= 1) & (length <= max_answer_length), score, -np.inf).reshape(len(start), -1)
    best = np.argsort(-score, axis=1, kind="stable")[:, :n_best]
    row, column = np.nonzero(np.take_along_axis(score, best, axis=1) > -np.inf)
    pair = best[row, column]
    s, e = pair // end.shape[1], pair % end.shape[1]
    return row + rows.start, start[row, s], end[row, e], start_logit[row, s], end_logit[row, e]
