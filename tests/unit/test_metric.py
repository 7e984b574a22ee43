"""Values worked out by hand from the official scripts' definitions."""

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_dist.tasks.question_answering.metric import (
    ExtractiveAnswerMetric,
    best_threshold,
    by_answerability,
    exact_match,
    f1,
    normalize_answer,
)
from qa_dist.tasks.question_answering.task import _no_answer_figures, _Texts, _tuned_threshold


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


def test_figures_by_answerability():
    exact, overlap = np.array([1.0, 0.0, 1.0]), np.array([1.0, 0.5, 1.0])
    assert by_answerability(exact, overlap, np.array([True, True, False])) == {
        "total": 3,
        "HasAns_exact": 50.0,
        "HasAns_f1": 75.0,
        "HasAns_total": 2,
        "NoAns_exact": 100.0,
        "NoAns_f1": 100.0,
        "NoAns_total": 1,
    }
    only = by_answerability(exact, overlap, np.array([True, True, True]))
    assert "NoAns_total" not in only  # as the official script, which leaves out a group that is empty


def test_no_answer_in_the_predictions():
    """The threshold decides, the odds are written down, and the tuned threshold sees suppressed answers."""
    texts = _Texts(
        {"a": "", "b": "x", "c": ""}, cast(Any, {}), ["right", "x", "wrong"], {"a": 1.0, "b": -1.0, "c": 2.0}
    )
    references = [["right"], ["x"], []]
    figures = _no_answer_figures(texts, references)
    assert (figures["HasAns_exact"], figures["NoAns_exact"]) == (50.0, 100.0)
    assert (figures["best_exact"], figures["best_exact_thresh"]) == (pytest.approx(200 / 3), -1.0)
    assert _tuned_threshold(texts, references) == 1.0
