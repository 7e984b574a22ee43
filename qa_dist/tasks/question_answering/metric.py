"""Exact match and F1, as the official SQuAD evaluation scripts define them (Rajpurkar et al. 2016, 2018)."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_ARTICLE_WORDS = frozenset(("a", "an", "the"))
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

NO_ANSWER_ODDS = 1e6
"""Null odds of an example whose windows hold no token that could be an answer."""


def normalized_words(text: str) -> list[str]:
    """The words of the text in lower case, without ASCII punctuation and English articles."""
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    if text.isascii() and text.isprintable():
        # letters, digits and spaces alone: an article is a word of its own, and the pattern, ten times as slow, no help
        return [word for word in text.split() if word not in _ARTICLE_WORDS]
    return _ARTICLES.sub(" ", text).split()


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces."""
    return " ".join(normalized_words(text))


def exact_match(prediction: str, answer: str) -> float:
    """1 if the two are equal after normalization, else 0."""
    return float(normalized_words(prediction) == normalized_words(answer))


def f1(prediction: str, answer: str, empty_matches: bool) -> float:
    """Harmonic mean of precision and recall over the words of the two.

    `empty_matches`: whether two texts without words score 1, as they do in SQuAD 2.0's script, or 0, as in 1.1's.
    """
    return _f1(normalized_words(prediction), normalized_words(answer), empty_matches)


def _f1(predicted: list[str], expected: list[str], empty_matches: bool) -> float:
    if predicted == expected:
        return float(empty_matches or bool(predicted))
    if set(predicted).isdisjoint(expected):
        return 0.0
    common = (Counter(predicted) & Counter(expected)).total()
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def score_each(
    predictions: Sequence[str], references: Sequence[Sequence[str]], v2: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Exact match and F1 of every prediction against the best of its accepted answers, each 0 to 1, [num_examples].

    With `v2` (SQuAD 2.0's rules) an example without accepted answers expects the empty text.
    """
    exact, overlap = np.zeros(len(predictions)), np.zeros(len(predictions))
    for i, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        predicted = normalized_words(prediction)
        accepted = [normalized_words(answer) for answer in dict.fromkeys(answers)]  # annotators often agree
        if v2:
            accepted = [words for words in accepted if words]
        accepted = accepted or [[]]
        exact[i] = predicted in accepted
        overlap[i] = max(_f1(predicted, words, empty_matches=v2) for words in accepted)
    return exact, overlap


def percent(scores: npt.NDArray[np.float64]) -> float:
    """Mean in percent, added up one by one as the official scripts do, so that the last digit is theirs."""
    total = 0.0
    for score in scores.tolist():
        total += score
    return 100.0 * total / len(scores)


def best_threshold(
    scores: npt.NDArray[np.float64],
    null_odds: npt.NDArray[np.float64],
    has_answer: npt.NDArray[np.bool_],
    is_empty: npt.NDArray[np.bool_],
    unanswered: int | None = None,
) -> tuple[float, float]:
    """The threshold on `null_odds` above which "no answer" is best predicted, and the score, in percent, it gives.

    The procedure of SQuAD 2.0's official script (Rajpurkar et al. 2018): start with "no answer" for all, and give
    the predictions one by one, in the order of their odds. `scores` are those of the predictions, 0 to 1;
    `is_empty` says which predictions are the empty text. All are [num_examples]. `unanswered` counts the questions
    that have no answer, where they are not all among these.
    """
    current = best = float((~has_answer).sum() if unanswered is None else unanswered)
    threshold = 0.0
    gains = np.where(has_answer, scores, np.where(is_empty, 0.0, -1.0)).tolist()
    for i in np.argsort(null_odds, kind="stable").tolist():
        current += gains[i]
        if current > best:
            best, threshold = current, float(null_odds[i])
    return 100.0 * best / len(scores), threshold


def score_predictions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    v2: bool,
    null_odds: Mapping[str, float] | None = None,
    na_prob_thresh: float = 1.0,
) -> dict[str, float]:
    """What the official script prints for a prediction file: its keys, its values to the last digit.

    `predictions` and `null_odds` are id -> text and id -> score of "no answer"; `references` id -> accepted texts,
    empty where there is no answer. Predictions for other ids are ignored. A question without a prediction scores 0
    under the rules of SQuAD 1.1, and is left out of all totals under those of 2.0 (`v2`), as in the scripts. With
    `null_odds`, predictions whose odds exceed `na_prob_thresh` count as "no answer" in all figures but `best_*`.
    Raises `KeyError` for a prediction that has no odds, and `ValueError` where none is for a known question.
    """
    if not references.keys() & predictions.keys():
        raise ValueError("no prediction is for a question of this data")
    if not v2:
        ids = list(references)
        exact, overlap = score_each([predictions.get(key, "") for key in ids], [references[key] for key in ids], v2)
        given = np.array([key in predictions for key in ids])  # an empty answer is right where only an article is
        return {"exact_match": percent(exact * given), "f1": percent(overlap * given)}

    ids = [key for key in references if key in predictions]
    exact, overlap = score_each([predictions[key] for key in ids], [references[key] for key in ids], v2)
    has_answer = np.array([bool(references[key]) for key in ids], dtype=bool)
    suppressed = np.array([null_odds is not None and null_odds[key] > na_prob_thresh for key in ids], dtype=bool)
    right_if_suppressed = (~has_answer).astype(np.float64)
    shown = {
        "exact": np.where(suppressed, right_if_suppressed, exact),
        "f1": np.where(suppressed, right_if_suppressed, overlap),
    }
    result = {name: percent(scores) for name, scores in shown.items()} | {"total": len(ids)}
    for group, members in (("HasAns", has_answer), ("NoAns", ~has_answer)):
        if members.any():
            result |= {f"{group}_{name}": percent(scores[members]) for name, scores in shown.items()}
            result[f"{group}_total"] = int(members.sum())
    if null_odds is not None:
        place = {key: i for i, key in enumerate(ids)}
        order = np.array([place[key] for key in null_odds if key in place], dtype=np.int64)  # decides between equals
        unanswered = sum(not answers for answers in references.values())  # the missing ones too
        odds = np.array([null_odds[ids[i]] for i in order])
        is_empty = np.array([not predictions[ids[i]] for i in order], dtype=bool)
        for name, scores in (("exact", exact), ("f1", overlap)):
            best, threshold = best_threshold(scores[order], odds, has_answer[order], is_empty, unanswered)
            result |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return result
