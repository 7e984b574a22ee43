"""Values worked out by hand from the official scripts' definitions."""

import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_dist.tasks.question_answering.answers import Texts
from qa_dist.tasks.question_answering.evaluate_metric import ExtractiveAnswerMetric
from qa_dist.tasks.question_answering.metric import (
    best_threshold,
    exact_match,
    f1,
    normalize_answer,
    score_predictions,
)
from qa_dist.tasks.question_answering.task import _tuned_threshold


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat,\tsat!", "cat sat"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("the", ""),
        ("«Été» — 東京", "«été» — 東京"),  # only ASCII punctuation is removed
        ("don't", "dont"),
        ("", ""),
    ],
)
def test_normalization(text: str, normal: str):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "f1_v1", "f1_v2"),
    [
        ("Paris", "paris.", 1, 1, 1),
        ("in Paris", "Paris", 0, 2 / 3, 2 / 3),
        ("red red wine", "red wine wine", 0, 2 / 3, 2 / 3),
        ("", "Paris", 0, 0, 0),
        ("", "", 1, 0, 1),
        ("the", "a", 1, 0, 1),
        ("Rome", "Paris", 0, 0, 0),
    ],
)
def test_one_answer(prediction: str, answer: str, em: float, f1_v1: float, f1_v2: float):
    assert exact_match(prediction, answer) == em
    assert f1(prediction, answer, empty_matches=False) == pytest.approx(f1_v1)
    assert f1(prediction, answer, empty_matches=True) == pytest.approx(f1_v2)


def test_the_best_of_several_answers_counts():
    metric = ExtractiveAnswerMetric("squad", keep_in_memory=True)
    figures = metric.compute(predictions=["in Paris", "x"], references=[["Lyon", "Paris", "in Paris now"], ["y"]])
    assert figures == {"exact_match": 0.0, "f1": pytest.approx(100 * 0.8 / 2)}


def test_squad_v2_scores_no_answer():
    metric = ExtractiveAnswerMetric("squad_v2", keep_in_memory=True)
    predictions = ["", "x", "", "the"]
    # no answer found right; an answer where there is none; none where there is one; only an article, so none
    figures = metric.compute(predictions=predictions, references=[[], [], ["x"], ["a"]])
    assert figures == {"exact_match": 50.0, "f1": 50.0}


# ------------------------------------------------------------------------------------------- SQuAD 2.0


@given(
    st.lists(
        st.tuples(st.floats(-9, 9).map(lambda x: round(x, 1)), st.booleans(), st.integers(0, 4), st.booleans()),
        min_size=1,
        max_size=30,
    )
)
def test_best_threshold_is_the_best_of_all_cuts(rows):
    odds = np.array([row[0] for row in rows])
    has_answer = np.array([row[1] for row in rows])
    is_empty = np.array([row[3] for row in rows])
    # an empty prediction scores 1 where there is no answer, and 0 where there is
    scores = np.array([(not h) * 1.0 if e else (s / 4 if h else 0.0) for _, h, s, e in rows])
    best, threshold = best_threshold(scores, odds, has_answer, is_empty)
    order = np.argsort(odds, kind="stable")
    totals = [
        sum(scores[i] if i in given_ else float(not has_answer[i]) for i in range(len(rows)))
        for given_ in (set(order[:k]) for k in range(len(rows) + 1))
    ]
    assert best == pytest.approx(100 * max(totals) / len(rows))
    first = int(np.argmax(np.round(totals, 9)))
    assert threshold == (0.0 if first == 0 else odds[order[first - 1]])


WORDS = st.sampled_from(["", "the", "a", "Paris", "paris.", "in Paris", "Été — 東京", "red red wine", "don't", "!"])
TEXTS = st.lists(WORDS, max_size=3).map(" ".join)


@st.composite
def prediction_files(draw: st.DrawFn) -> tuple[dict[str, list[str]], dict[str, str], dict[str, float]]:
    """Accepted answers, predictions (some missing, some for other questions), and null odds in another order."""
    count = draw(st.integers(1, 12))
    ids = [f"q{i}" for i in range(count)]
    answers = {key: draw(st.lists(TEXTS, max_size=3)) for key in ids}
    predicted = draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
    predictions = {key: draw(TEXTS) for key in [*predicted, "a stranger"]}
    order = draw(st.permutations(sorted(predictions)))
    return answers, predictions, {key: draw(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 1.5])) for key in order}


@given(prediction_files())
def test_files_score_as_the_official_script_of_1_1_defines(files):
    """Every question of the data counts; one without a prediction scores nothing."""
    answers, predictions, _ = files
    answers = {key: accepted or [""] for key, accepted in answers.items()}
    exact = overlap = 0.0
    for key, accepted in answers.items():
        if key in predictions:
            exact += max(exact_match(predictions[key], answer) for answer in accepted)
            overlap += max(f1(predictions[key], answer, empty_matches=False) for answer in accepted)
    assert score_predictions(predictions, answers, v2=False) == {
        "exact_match": 100.0 * exact / len(answers),
        "f1": 100.0 * overlap / len(answers),
    }


@given(prediction_files(), st.booleans())
def test_files_score_as_the_official_script_of_2_0_defines(files, with_odds: bool):
    """Only questions with a prediction count; odds above 1.0 suppress it; thresholds look at what was predicted."""
    answers, predictions, odds = files
    scores: dict[str, dict[str, float]] = {"exact": {}, "f1": {}}
    for key, accepted in answers.items():
        if key in predictions:
            gold = [answer for answer in accepted if normalize_answer(answer)] or [""]
            scores["exact"][key] = max(exact_match(predictions[key], answer) for answer in gold)
            scores["f1"][key] = max(f1(predictions[key], answer, empty_matches=True) for answer in gold)
    expected: dict[str, float] = {"total": len(scores["exact"])}
    groups = {
        "": set(answers),
        "HasAns_": {k for k in answers if answers[k]},
        "NoAns_": {k for k in answers if not answers[k]},
    }
    for name, raw in scores.items():
        final = {k: float(not answers[k]) if with_odds and odds[k] > 1.0 else v for k, v in raw.items()}
        for prefix, members in groups.items():
            own = [value for key, value in final.items() if key in members]
            if own:
                expected[f"{prefix}{name}"] = 100.0 * sum(own) / len(own)
                expected[f"{prefix}total"] = len(own)
        if with_odds:
            best = now = sum(not accepted for accepted in answers.values())
            threshold = 0.0
            for key in sorted(odds, key=lambda k: odds[k]):
                if key in raw:
                    now += raw[key] if answers[key] else (-1 if predictions[key] else 0)
                    if now > best:
                        best, threshold = now, odds[key]
            expected |= {f"best_{name}": 100.0 * best / len(raw), f"best_{name}_thresh": threshold}
    assert score_predictions(predictions, answers, v2=True, null_odds=odds if with_odds else None) == expected


def test_predictions_for_other_data():
    with pytest.raises(ValueError, match="no prediction"):
        score_predictions({"x": "y"}, {"q": ["y"]}, v2=False)


def test_no_answer_in_the_predictions():
    """The threshold decides, the odds are written down, and the tuned threshold sees suppressed answers."""
    odds = {"a": 1.0, "b": -1.0, "c": 2.0}
    texts = Texts({"a": "", "b": "x", "c": ""}, cast(Any, {}), ["right", "x", "wrong"], odds, np.zeros(3))
    references: list[tuple[str, ...]] = [("right",), ("x",), ()]
    figures = score_predictions(
        texts.predictions,
        dict(zip("abc", references, strict=True)),
        v2=True,
        null_odds=texts.null_odds,
        na_prob_thresh=math.inf,
    )
    assert (figures["HasAns_exact"], figures["NoAns_exact"]) == (50.0, 100.0)
    assert (figures["best_exact"], figures["best_exact_thresh"]) == (pytest.approx(200 / 3), -1.0)
    assert _tuned_threshold(texts, references) == 1.0
