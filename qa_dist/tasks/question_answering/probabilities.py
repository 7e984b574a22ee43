"""Decode start and end logits by the rule of transformers' removed question answering pipeline.

As its last version (4.57) did it: in each window the probability of a position is the softmax over the allowed ones,
which are the context's tokens and the classification token, and the probability of a span is the product of those of
its start and its end. The most probable spans of each window are candidates. Candidates with the same text, whatever
its case, are one answer, at the place of the first of them, with the sum of their scores.

Evaluation does not use this rule; see `answers.py` for the one it uses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from qa_dist.tasks.question_answering.characters import spans_of_whole_characters
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures

SPANS_PER_PART = 1000
"""Spans that are processed between two checks of the time limit."""


def best_spans(
    start_logits: Tensor,
    end_logits: Tensor,
    context_begin: Tensor,
    context_end: Tensor,
    cls: Tensor,
    *,
    count: int,
    max_answer_length: int,
) -> dict[str, Tensor]:
    """Find the `count` most probable spans of at most `max_answer_length` tokens of each window, on the device.

    Shapes: logits [windows, length]; `context_begin`, `context_end`, `cls` [windows]. Returns `probability`, `start`,
    `end` [windows, count], best first: positions count from the window's first context token, and probabilities are 0
    where there are fewer spans; and `null_probability` [windows], that of the classification token, which stands for
    "no answer".
    """
    windows, length = start_logits.shape
    places = torch.arange(length, device=start_logits.device)
    in_context = (places >= context_begin[:, None]) & (places < context_end[:, None])
    is_allowed = in_context | (places == cls[:, None])
    logits = torch.stack((start_logits, end_logits)).float()
    log_probabilities = logits.masked_fill(~is_allowed, -torch.inf).log_softmax(dim=2)
    start, end = log_probabilities.masked_fill(~in_context, -torch.inf)
    # Spans by their first token and their length: [windows, length, longest] instead of [windows, length, length].
    longest = min(max_answer_length, length)
    ends = F.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)
    spans = (start[:, :, None] + ends).flatten(1)
    kept = min(count, spans.shape[1])
    best, place = spans.topk(kept, dim=1)
    first = place // longest
    last = first + place % longest
    rows = torch.arange(windows, device=logits.device)
    missing = (0, count - kept)
    return {
        "probability": F.pad(best.exp(), missing),
        "start": F.pad(first - context_begin[:, None], missing),
        "end": F.pad(last - context_begin[:, None], missing),
        "null_probability": (log_probabilities[0, rows, cls] + log_probabilities[1, rows, cls]).exp(),
    }


class Found(NamedTuple):
    """The answers to one question."""

    answers: list[tuple[float, int, int]]
    """(probability, first character, one past the last character), best first; of each text once."""
    no_answer_probability: float
    """That of the classification token, the lowest of all windows."""


def answers_of(
    outputs: dict[str, npt.NDArray[Any]],
    features: QuestionAnsweringFeatures,
    contexts: list[str],
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Found]:
    """Return the answers in each of `contexts`, from the `best_spans` of all `features`.

    `meanwhile` is called from time to time, such as to raise an error when the time is up. A score is a sum of
    probabilities in windows that overlap, and so may exceed 1; it is cut to 1 after sorting.
    """
    probability = outputs["probability"]
    is_span = probability > 0
    window = np.nonzero(is_span)[0]
    offset = features.char_starts.offsets[window]
    start = features.char_starts.values[offset + outputs["start"][is_span]].astype(np.int64)
    end = features.char_ends.values[offset + outputs["end"][is_span]].astype(np.int64)
    for at in range(0, len(start), SPANS_PER_PART):
        part = slice(at, at + SPANS_PER_PART)
        own = features.example[window[part]]
        start[part], end[part] = spans_of_whole_characters(contexts, own, start[part], end[part])
        meanwhile()

    merged: list[dict[str, list[Any]]] = [{} for _ in contexts]
    columns = (features.example[window], probability[is_span], start, end)
    for example, share, first, last in zip(*(column.tolist() for column in columns), strict=True):
        if first < last:
            text = contexts[example][first:last].lower()
            merged[example].setdefault(text, [0.0, first, last])[0] += share
    null = np.ones(len(contexts))
    np.minimum.at(null, features.example, outputs["null_probability"])
    return [_found(answers, share) for answers, share in zip(merged, null.tolist(), strict=True)]


def _found(merged: dict[str, list[Any]], no_answer_probability: float) -> Found:
    answers = sorted(merged.values(), key=lambda answer: -answer[0])
    return Found([(min(share, 1.0), start, end) for share, start, end in answers], no_answer_probability)
