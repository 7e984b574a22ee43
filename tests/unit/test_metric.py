"""Values worked out by hand from the official scripts' definitions."""

import pytest

from qa_dist.tasks.question_answering.metric import ExtractiveAnswerMetric, exact_match, f1, normalize_answer


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
