"""What an evaluation of question answering found, question by question."""

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qa_dist.errors import UserError
from qa_dist.tasks.predictions import unmatched
from qa_dist.tasks.question_answering.data import Example
from qa_dist.tasks.question_answering.metric import NO_ANSWER_ODDS, best_threshold, percent, score_each
from qa_dist.tasks.task import Alternative, Mark, Review, ReviewCurve, ReviewedExample, ReviewTable

PREDICTIONS, N_BEST, NULL_ODDS = "predictions.json", "nbest_predictions.json", "null_odds.json"
FIGURES = {"exact_match": "EM", "f1": "F1"}
OUTCOMES = {"no_answer_predicted": "no answer predicted", "has_no_answer": "has no answer"}

QUESTION_WORD = re.compile(r"\b(who|whom|whose|what|when|where|why|how|which)\b", re.IGNORECASE)
QUESTION_WORDS = ("who", "what", "when", "where", "why", "how", "which", "other")


MOST = 1e15
"""Of a figure that can be drawn; what is beyond, or no number, was not found by an evaluation."""


@dataclass(frozen=True)
class Bins:
    """Ranges of a number of things, each up to and with its bound; the last one has none."""

    bounds: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        lows = [1, *(bound + 1 for bound in self.bounds)]
        ranges = [f"{low}" if low == high else f"{low}–{high}" for low, high in zip(lows, self.bounds, strict=False)]
        return [*ranges, f"{lows[-1]}+"]

    def name(self, number: int) -> str:
        return self.names[bisect.bisect_left(self.bounds, number)]


ANSWER_WORDS = Bins((1, 2, 4, 8))
CONTEXT_WORDS = Bins((50, 100, 150, 200, 300))
WINDOWS = Bins((1, 2, 3))


class Found(NamedTuple):
    """What there is for one question; of the files, whose contents are not to be trusted."""

    predicted: str
    alternatives: tuple[Alternative, ...]
    null_odds: float | None


def review(
    examples: Sequence[Example], windows: npt.NDArray[np.int64], files: Mapping[str, Any], threshold: float | None
) -> Review:
    """The review of `examples`, of which each has so many `windows`, [num_examples].

    `threshold` is the present one for null odds; None under the rules of SQuAD 1.1. Raises `UserError` where `files`
    hold no predictions of these examples.
    """
    found, notes = _found(examples, files)
    counts = {example.id: int(count) for example, count in zip(examples, windows.tolist(), strict=True)}
    known = [example for example in examples if example.id in found]
    predictions = [found[example.id].predicted for example in known]
    exact, overlap = score_each(predictions, [example.answers for example in known], v2=threshold is not None)
    reviewed = [
        _reviewed(example, found[example.id], counts[example.id], em, f1)
        for example, em, f1 in zip(known, exact.tolist(), overlap.tolist(), strict=True)
    ]
    result = Review(
        reviewed, ("question", "context"), "no answer", FIGURES, _groupings(known), dict(OUTCOMES), notes=notes
    )
    if threshold is None:
        result.outcomes = {}
    elif all(found[example.id].null_odds is not None for example in known):
        _add_thresholds(result, known, found, threshold)
    else:
        notes.append(f"{NULL_ODDS} lacks figures, so there is no curve of the no-answer threshold")
    return result


def _found(examples: Sequence[Example], files: Mapping[str, Any]) -> tuple[dict[str, Found], list[str]]:
    """What the files say of each example by its id, and notes on what they lack."""
    rows = files.get(PREDICTIONS)
    given = {key: text for key, text in rows.items() if isinstance(text, str)} if isinstance(rows, dict) else {}
    if not given:
        raise UserError(f"{PREDICTIONS}: there are none that can be read; evaluate the model (qa-dist evaluate)")
    ids = [example.id for example in examples]
    notes = unmatched(PREDICTIONS, given, ids, "question", "are left out")
    n_best, null_odds = (
        content if isinstance(content := files.get(name), dict) else {} for name in (N_BEST, NULL_ODDS)
    )
    found = {
        example.id: Found(
            given[example.id],
            _alternatives(n_best.get(example.id), example.context),
            _number(null_odds.get(example.id)),
        )
        for example in examples
        if example.id in given
    }
    bare = sum(not one.alternatives for one in found.values())
    if bare:
        notes.append(f"{N_BEST} has nothing on {bare:,} questions, so their probabilities are not known")
    return found, notes


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < MOST else None


def _alternatives(rows: Any, context: str) -> tuple[Alternative, ...]:
    found = []
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict):
            continue
        text, probability = row.get("text"), _number(row.get("probability"))
        if isinstance(text, str) and probability is not None:
            found.append(Alternative(text, min(max(probability, 0.0), 1.0), _span(row, text, context)))
    return tuple(found)


def _span(row: dict[str, Any], text: str, context: str) -> tuple[int, int] | None:
    """Where the row says that the text stands, if it does stand there."""
    start, end = row.get("start"), row.get("end")
    if type(start) is int and type(end) is int and 0 <= start < end and context[start:end] == text:
        return start, end
    return None


def _reviewed(example: Example, found: Found, windows: int, exact: float, overlap: float) -> ReviewedExample:
    chosen = next((one for one in found.alternatives if one.text == found.predicted), None)
    span = chosen.span if chosen else None
    if span is None and found.predicted and example.context.count(found.predicted) == 1:
        start = example.context.index(found.predicted)
        span = start, start + len(found.predicted)
    answers = zip(example.answers, example.answer_starts, strict=True)
    gold = dict.fromkeys((start, start + len(text)) for text, start in answers if start >= 0)
    marks = [Mark("gold", *place) for place in gold] + ([Mark("predicted", *span)] if span else [])
    outcomes = {"no_answer_predicted": not found.predicted, "has_no_answer": not example.answers}
    return ReviewedExample(
        id=example.id,
        heading=example.question,
        text=example.context,
        expected=tuple(dict.fromkeys(example.answers)),
        predicted=found.predicted,
        is_right=exact == 1.0,
        figures={"exact_match": 100.0 * exact, "f1": 100.0 * overlap},
        groups=_groups(example, windows),
        outcomes=tuple(name for name, holds in outcomes.items() if holds),
        marks=tuple(marks),
        confidence=chosen.probability if chosen else None,
        alternatives=found.alternatives,
    )


def _groups(example: Example, windows: int) -> dict[str, str]:
    longest = max((len(answer.split()) for answer in example.answers), default=0)
    return {
        "question word": question_word(example.question),
        "words of the longest answer": ANSWER_WORDS.name(longest) if example.answers else "no answer",
        "words of the context": CONTEXT_WORDS.name(len(example.context.split())),
        "windows": WINDOWS.name(windows),
        "answer": "has one" if example.answers else "has none",
    }


def _groupings(examples: Sequence[Example]) -> dict[str, Sequence[str]]:
    """All groups of `_groups`, in order; where all examples have an answer, that is not asked."""
    groupings: dict[str, Sequence[str]] = {
        "question word": QUESTION_WORDS,
        "words of the longest answer": [*ANSWER_WORDS.names, "no answer"],
        "words of the context": CONTEXT_WORDS.names,
        "windows": WINDOWS.names,
    }
    return (
        groupings if all(example.answers for example in examples) else {**groupings, "answer": ("has one", "has none")}
    )


def question_word(question: str) -> str:
    """The first of English's question words in `question`; whom and whose count as who."""
    found = QUESTION_WORD.search(question)
    word = found[1].lower() if found else "other"
    return "who" if word in ("whom", "whose") else word


def _add_thresholds(review: Review, examples: Sequence[Example], found: Mapping[str, Found], threshold: float) -> None:
    """The curve of the figures over the no-answer threshold, and a table of the thresholds that matter.

    Unlike the official script's, they also see the answers that the present threshold suppresses.
    """
    best = [next((one.text for one in found[example.id].alternatives if one.text), "") for example in examples]
    # without the list of the best, what was predicted is all there is to tell
    best = [text or found[example.id].predicted for text, example in zip(best, examples, strict=True)]
    odds = np.array([found[example.id].null_odds for example in examples], dtype=np.float64)
    has_answer = np.array([bool(example.answers) for example in examples])
    is_empty = np.array([not text for text in best])
    scores = dict(zip(FIGURES, score_each(best, [example.answers for example in examples], v2=True), strict=True))

    def at(one: float) -> dict[str, float]:
        return {name: percent(np.where(odds > one, ~has_answer, each).astype(float)) for name, each in scores.items()}

    curves = {FIGURES[name]: threshold_curve(each, odds, has_answer) for name, each in scores.items()}
    places = {"present": threshold} if abs(threshold) < MOST else {}
    for name, each in scores.items():
        highest, place = best_threshold(each, odds, has_answer, is_empty)
        # where "no answer" for all is best, the official search says 0, which is not what gives that
        is_given = at(place)[name] > highest - 1e-9
        places[f"best {FIGURES[name]}"] = place if is_given else curves[FIGURES[name]][0][0]
    review.curves.append(
        ReviewCurve("No-answer threshold", "score of “no answer” less that of the best answer", curves, places)
    )
    header = ("threshold", "value", *FIGURES.values(), "“no answer”")
    rows = [(name, place, *at(place).values(), int((odds > place).sum())) for name, place in places.items()]
    review.tables.append(ReviewTable("No-answer threshold", header, rows))


def threshold_curve(
    scores: npt.NDArray[np.float64], null_odds: npt.NDArray[np.float64], has_answer: npt.NDArray[np.bool_]
) -> list[tuple[float, float]]:
    """(threshold, mean score in percent) for every threshold that changes something, in ascending order; but not for
    `NO_ANSWER_ODDS`, which stand for infinity.

    "No answer" is predicted where `null_odds` exceed the threshold; the first one is below all of them. `scores`
    are those of the answers, 0 to 1. Shapes: [num_examples] each.
    """
    order = np.argsort(null_odds, kind="stable")
    ordered = null_odds[order]
    gains = (scores - ~has_answer)[order]
    totals = (~has_answer).sum() + np.cumsum(gains)
    last = np.append(ordered[1:] != ordered[:-1], True) & (ordered < NO_ANSWER_ODDS)  # equal odds change at once
    points = zip(ordered[last].tolist(), (100.0 * totals[last] / len(scores)).tolist(), strict=True)
    finite = ordered[ordered < NO_ANSWER_ODDS]
    below = float(ordered[0]) - max(1e-6, 0.02 * float(np.ptp(finite)) if len(finite) else 0.0)
    return [(below, 100.0 * float((~has_answer).mean())), *points]
