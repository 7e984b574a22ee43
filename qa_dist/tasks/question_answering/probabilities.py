"""From start and end logits to answers with probabilities, as transformers' pipeline for question answering gave them.

The pipeline was removed in transformers 5. As its last version (4.57) did it: in each window the probability of a
position is the softmax over the allowed ones, which are the context's tokens and the classification token, and the
probability of a span is the product of those of its start and its end. Of each window the most probable spans are
candidates; those with the same text (whatever its case) are one answer, at the place of the first of them, whose
score is the sum of theirs.
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
"""Looked at between two looks at the clock."""


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
    """The `count` most probable spans of at most `max_answer_length` tokens of each window, on the device.

    Shapes: logits [windows, length]; `context_begin`, `context_end`, `cls` [windows]. Returns `probability`, `start`,
    `end` [windows, count], best first: positions count from the window's first context token, and probabilities are 0
    where there are fewer spans; `score` [windows], the sum of the best span's logits; `null_probability` and
    `null_score` [windows], the same of the classification token, which stands for "no answer".
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
        "score": logits[0, rows, first[:, 0]] + logits[1, rows, last[:, 0].clamp(max=length - 1)],
        "null_probability": (log_probabilities[0, rows, cls] + log_probabilities[1, rows, cls]).exp(),
        "null_score": logits[0, rows, cls] + logits[1, rows, cls],
    }


class Found(NamedTuple):
    """What the windows of one question and context say."""

    answers: list[tuple[float, int, int]]
    """(probability, first character, one past the last character), best first; of each text once."""
    no_answer_probability: float
    """That of the classification token, the lowest of all windows."""
    null_odds: float
    """Score of "no answer", the lowest of all windows, less that of the best span, in logits: what the thresholds of
    SQuAD 2.0 are compared with. Infinite where the context has no token."""
    windows: list[tuple[int, int]]
    """What the model read at a time: (first character, one past the last character) of the context."""


def answers_of(
    outputs: dict[str, npt.NDArray[Any]],
    features: QuestionAnsweringFeatures,
    contexts: list[str],
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Found]:
    """What the `best_spans` of all `features` say, for each context. `meanwhile` is called now and then, such as to
    raise an error when the time is up.

    A score is a sum of probabilities in windows that overlap, and so may exceed 1; it is cut there, after sorting.
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

    found = [_Merged() for _ in contexts]
    columns = (features.example[window], probability[is_span], start, end)
    for example, share, first, last in zip(*(column.tolist() for column in columns), strict=True):
        if first < last:
            text: str = contexts[example][first:last]
            found[example].add(text.lower(), share, first, last)
    for i, example in enumerate(features.example.tolist()):
        own = found[example]
        own.null_probability = min(own.null_probability, float(outputs["null_probability"][i]))
        own.null_score = min(own.null_score, float(outputs["null_score"][i]))
        if is_span[i].any():
            own.score = max(own.score, float(outputs["score"][i]))
            starts, ends = features.char_starts[i], features.char_ends[i]
            own.windows.append((int(starts[0]), int(ends[-1])))
    return [merged.found() for merged in found]


class _Merged:
    """The spans of one context, those with the same text as one."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Any]] = {}
        self.null_probability = 1.0
        self.null_score = np.inf
        self.score = -np.inf
        self.windows: list[tuple[int, int]] = []

    def add(self, text: str, probability: float, start: int, end: int) -> None:
        self.answers.setdefault(text, [0.0, start, end])[0] += probability

    def found(self) -> Found:
        answers = sorted(self.answers.values(), key=lambda answer: -answer[0])
        cut = [(min(share, 1.0), start, end) for share, start, end in answers]
        return Found(cut, self.null_probability, self.null_score - self.score, self.windows)
