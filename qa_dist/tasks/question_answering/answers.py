"""From the windows' best starts and ends to the answers of every example: their texts, places and probabilities.

Evaluation and `QuestionAnswerer` both use `find_answers`, so that a model gives the answers it was evaluated on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qa_dist.tasks.question_answering.characters import spans_of_whole_characters
from qa_dist.tasks.question_answering.decoding import Answers, decode, repeated
from qa_dist.tasks.question_answering.features import QuestionAnsweringFeatures
from qa_dist.tasks.question_answering.metric import NO_ANSWER_ODDS


class Texts(NamedTuple):
    """The answers of all examples, in the order of the examples."""

    predictions: dict[str, str]
    """Id -> answer."""
    n_best: "NBestAnswers"
    """Id -> best answers first, with probabilities over the list."""
    best: list[str]
    """The best answer of each example, whatever the score of "no answer"."""
    null_odds: dict[str, float]
    """Id -> score of "no answer" less that of the best answer; empty without a threshold."""
    null_probabilities: npt.NDArray[np.float64]
    """Probability of "no answer" in a list that holds the best answers and "no answer", [num_examples]."""


@dataclass(frozen=True)
class NBestAnswers(Mapping[str, list[dict[str, Any]]]):
    """Id -> best answers first, with probabilities over the list.

    The lists are made when they are asked for: those of all examples at once are a hundred times as large as what
    they are made of.
    """

    rows: dict[str, int]
    contexts: list[str]
    bounds: npt.NDArray[np.int64]
    """The answers of example i are `bounds[i]` to `bounds[i + 1]` of the columns."""
    columns: dict[str, npt.NDArray[Any]]
    no_answer: list[tuple[int, float, float]] | None
    """For each example the place, the score and the probability of "no answer"."""

    def highest_probabilities(self) -> npt.NDArray[np.float64]:
        """Of the best answer of each example that has any."""
        return self.columns["probability"][self.bounds[:-1][np.diff(self.bounds) > 0]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __getitem__(self, key: str) -> list[dict[str, Any]]:
        i = self.rows[key]
        context, own = self.contexts[i], slice(self.bounds[i], self.bounds[i + 1])
        entries: list[dict[str, Any]] = [
            {
                "text": context[start:end],
                "score": score,
                "start_logit": start_logit,
                "end_logit": end_logit,
                "start": start,
                "end": end,
                "window": window,
                "probability": probability,
            }
            for start, end, score, start_logit, end_logit, window, probability in zip(
                *(column[own].tolist() for column in self.columns.values()), strict=True
            )
        ]
        if self.no_answer is not None:
            place, score, probability = self.no_answer[i]
            entries.insert(place, {"text": "", "score": score, "probability": probability})
        return entries


def find_answers(
    outputs: dict[str, npt.NDArray[Any]],
    features: QuestionAnsweringFeatures,
    *,
    n_best: int,
    max_answer_length: int,
    threshold: float | None,
) -> Texts:
    """Find the answers of all examples of `features`; `outputs` are the `candidates` of all their windows.

    `threshold`: for SQuAD 2.0, predict "no answer" where its score exceeds the best answer's by more, and list it among
    the best answers. None: every example gets an answer, if its context holds any token.
    """
    examples = features.examples().items
    answers = decode(outputs, features, len(examples), n_best=n_best, max_answer_length=max_answer_length)
    contexts, ids = [example.context for example in examples], [example.id for example in examples]
    kept, starts, ends = _distinct_spans(answers, contexts)
    owner, score = answers.example[kept], answers.score[kept]
    counts = np.bincount(owner, minlength=len(examples))
    bounds = np.concatenate([[0], np.cumsum(counts)])
    has_any = counts > 0
    first = bounds[:-1][has_any]
    highest = np.full(len(examples), -np.inf)
    highest[has_any] = score[first]
    null = answers.null_score.astype(np.float64)
    odds = np.where(has_any, null - highest, NO_ANSWER_ODDS)
    best = [""] * len(examples)
    for i, start, end in zip(
        np.flatnonzero(has_any).tolist(), starts[first].tolist(), ends[first].tolist(), strict=True
    ):
        best[i] = contexts[i][start:end]
    suppressed = [False] * len(examples) if threshold is None else (odds > threshold).tolist()
    predictions = {name: "" if none else text for name, text, none in zip(ids, best, suppressed, strict=True)}

    # softmax over the answers of each example and, in SQuAD 2.0, "no answer"
    top = highest if threshold is None else np.maximum(highest, null)
    weights = np.exp(score - top[owner])
    answer_weights = np.bincount(owner, weights, minlength=len(examples))
    null_weights = np.where(has_any, np.exp(np.minimum(null - np.where(has_any, top, null), 700.0)), 1.0)
    total = answer_weights if threshold is None else answer_weights + null_weights
    null_probabilities = null_weights / (answer_weights + null_weights)
    columns = {
        "start": starts,
        "end": ends,
        "score": score,
        "start_logit": answers.start_logit[kept],
        "end_logit": answers.end_logit[kept],
        "window": answers.feature[kept] - np.searchsorted(features.example, owner),
        "probability": weights / total[owner],
    }
    no_answer = None
    if threshold is not None:  # behind the answers of the same score
        ahead = np.bincount(owner[score >= null[owner]], minlength=len(examples))
        no_answer = list(zip(ahead.tolist(), null.tolist(), null_probabilities.tolist(), strict=True))
    n_best_answers = NBestAnswers(dict(zip(ids, range(len(ids)), strict=True)), contexts, bounds, columns, no_answer)
    null_odds = {} if threshold is None else dict(zip(ids, odds.tolist(), strict=True))
    return Texts(predictions, n_best_answers, best, null_odds, null_probabilities)


def _distinct_spans(
    answers: Answers, contexts: list[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return which of `answers` to keep, and the first and one past the last character of each: [num_kept] each.

    Two spans of tokens may be the same characters once the blanks at their edges are left out; the better one is kept.
    """
    starts, ends = spans_of_whole_characters(contexts, answers.example, answers.start_char, answers.end_char)
    kept = np.delete(np.arange(len(starts)), repeated(answers.example, starts, ends))
    return kept, starts[kept], ends[kept]
