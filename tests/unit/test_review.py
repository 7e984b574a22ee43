"""An evaluation, question by question: groups, figures, marks, calibration, thresholds; and two, compared."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_dist.config import DataConfig, ModelConfig, RunConfig
from qa_dist.reporting.report.breakdown import Comparison, breakdowns, calibration
from qa_dist.tasks import load_task
from qa_dist.tasks.question_answering.data import Example
from qa_dist.tasks.question_answering.metric import best_threshold, score_each, score_predictions
from qa_dist.tasks.question_answering.review import ANSWER_WORDS, question_word, review, threshold_curve
from qa_dist.tasks.task import Review, ReviewedExample
from tests.helpers import TINY_BERT
from tests.report_runs import (
    CONTEXT,
    EXAMPLES,
    N_BEST,
    PREDICTIONS,
    PROBABILITIES,
    answer,
    example,
    reviewed,
    write_run,
)

# ------------------------------------------------------------------------------------------ question by question


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Who was it?", "who"),
        ("To whom was it given?", "who"),
        ("Whose is it?", "who"),
        ("In what year did it end when he left?", "what"),
        ("What's that?", "what"),
        ("HOW many?", "how"),
        ("For which reason?", "which"),
        ("Name the whole nowhere.", "other"),
        ("Wer war das?", "other"),
    ],
)
def test_the_first_question_word_counts(question: str, word: str):
    assert question_word(question) == word


def test_bins_hold_their_upper_bounds():
    assert ANSWER_WORDS.names == ["1", "2", "3–4", "5–8", "9+"]
    assert [ANSWER_WORDS.name(n) for n in (1, 2, 3, 4, 5, 8, 9, 40)] == [
        "1",
        "2",
        "3–4",
        "3–4",
        "5–8",
        "5–8",
        "9+",
        "9+",
    ]


def test_examples_are_in_groups_by_question_answer_context_and_windows(tmp_path: Path):
    long = "A word. " * 120 + "Ada wrote it."
    examples = [*EXAMPLES, example("q7", "When?", long, "Ada wrote it")]
    found = reviewed(write_run(tmp_path / "run", examples, {**PREDICTIONS, "q7": "Ada"}))
    assert [one.groups["question word"] for one in found.examples] == [
        "where", "what", "who", "other", "why", "how", "when",
    ]  # fmt: skip
    by_id = {one.id: one.groups for one in found.examples}
    # the longest accepted answer counts
    assert [by_id[f"q{i}"]["words of the longest answer"] for i in range(1, 8)] == [
        "2", "1", "2", "3–4", "3–4", "2", "3–4",
    ]  # fmt: skip
    assert by_id["q1"]["words of the context"] == "1–50"
    assert by_id["q7"]["words of the context"] == "201–300"
    assert by_id["q6"]["windows"] == "1"
    assert by_id["q7"]["windows"] == "4+"
    assert "answer" not in found.groupings  # all have one
    order = [row.name for row in next(b for b in breakdowns(found) if b.name == "question word").rows]
    assert order == ["who", "what", "when", "where", "why", "how", "other"]


def test_each_example_is_scored_as_the_official_script_does(tmp_path: Path):
    found = reviewed(write_run(tmp_path / "run"))
    predictions = [PREDICTIONS[one["id"]] for one in EXAMPLES]
    exact, overlap = score_each(predictions, [[a["text"] for a in one["answers"]] for one in EXAMPLES], v2=False)
    assert [one.figures["exact_match"] for one in found.examples] == (100 * exact).tolist()
    assert [one.figures["f1"] for one in found.examples] == (100 * overlap).tolist()
    assert [one.is_right for one in found.examples] == [True, False, False, True, False, False]
    (everything,) = breakdowns(found)[0].rows
    assert everything.count == 6
    assert everything.means == pytest.approx([100 * 2 / 6, 100 * (1 + 0.5 + 2 / 3 + 1 + 0 + 2 / 3) / 6])


@pytest.mark.parametrize(("threshold", "f1"), [(None, 0.0), (0.0, 100.0)])
def test_the_rules_are_those_of_the_data(threshold: float | None, f1: float):
    """Two texts of which normalization leaves nothing have no word in common for SQuAD 1.1, and are equal for 2.0."""
    examples = [Example("q1", "Which article?", "the A", ("the",), (0,))]
    (one,) = review(examples, np.array([1]), {"predictions.json": {"q1": "A"}}, threshold).examples
    assert (one.figures["f1"], one.is_right) == (f1, True)


def test_marks_are_the_accepted_and_the_predicted_text(tmp_path: Path):
    found = reviewed(write_run(tmp_path / "run", files=N_BEST))
    for one in found.examples:
        marked = {
            kind: [one.text[m.start : m.end] for m in one.marks if m.kind == kind] for kind in ("gold", "predicted")
        }
        assert marked == {"gold": list(one.expected), "predicted": [one.predicted]}
        assert one.confidence == PROBABILITIES[one.id]
        assert (one.alternatives[0].text, one.alternatives[0].probability) == (one.predicted, PROBABILITIES[one.id])


def test_what_the_list_of_the_best_says_wrongly_marks_nothing():
    examples = [Example("q1", "Who?", "Ada met Ada.", ("Ada",), (0,))]
    wrong = [
        {"text": "Ada", "start": 8, "end": 11, "probability": 0.5},
        {"text": "Ada", "start": -9, "end": 900, "probability": 0.3},
        {"text": "met", "start": 0, "end": 3, "probability": 7},
        {"text": "Ada", "start": True, "end": 3.5, "probability": 0.1},
        {"text": 5, "probability": 0.1},
        {"text": "Ada", "probability": "high"},
        "Ada",
    ]
    files = {"predictions.json": {"q1": "Ada"}, "nbest_predictions.json": {"q1": wrong}}
    (one,) = review(examples, np.array([1]), files, None).examples
    assert [(a.text, a.probability, a.span) for a in one.alternatives] == [
        ("Ada", 0.5, (8, 11)),
        ("Ada", 0.3, None),
        ("met", 1.0, None),
        ("Ada", 0.1, None),
    ]
    assert [(m.kind, m.start) for m in one.marks] == [("gold", 0), ("predicted", 8)]
    # without the list, an answer that stands in two places is marked in neither
    (one,) = review(examples, np.array([1]), {"predictions.json": {"q1": "Ada"}}, None).examples
    assert [m.kind for m in one.marks] == ["gold"]
    assert one.confidence is None


# -------------------------------------------------------------------------------------- calibration, thresholds


def test_calibration_by_hand(tmp_path: Path):
    found = calibration(reviewed(write_run(tmp_path / "run", files=N_BEST)).examples)
    assert found is not None
    # right: q1 (0.95) and q4 (0.58)
    assert [(round(b.low, 1), b.count, round(b.confidence, 6), b.right) for b in found.bins] == [
        (0.0, 1, 0.05, 0.0),
        (0.2, 1, 0.3, 0.0),
        (0.5, 2, 0.565, 0.5),
        (0.9, 2, 0.93, 0.5),
    ]
    assert found.error == pytest.approx((0.05 + 0.3 + 2 * 0.065 + 2 * 0.43) / 6)


@pytest.mark.parametrize("seed", range(20))
def test_the_highest_point_of_the_threshold_curve_is_the_official_best(seed: int):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 60))
    has_answer = generator.random(count) < 0.6
    scores = np.where(has_answer, generator.random(count), 0.0)
    odds = generator.normal(size=count)
    curve = threshold_curve(scores, odds, has_answer)
    best, threshold = best_threshold(scores, odds, has_answer, np.zeros(count, dtype=bool))
    assert max(y for _, y in curve) == pytest.approx(best, abs=1e-9)
    if threshold:
        assert dict(curve)[threshold] == pytest.approx(best, abs=1e-9)
    # and every point is what predicting that way gives
    for place, value in curve:
        assert value == pytest.approx(100 * np.where(odds > place, ~has_answer, scores).mean(), abs=1e-9)


def test_equal_odds_change_together():
    curve = threshold_curve(np.array([1.0, 0.0, 0.5]), np.array([2.0, 2.0, 3.0]), np.array([True, False, True]))
    assert curve[1:] == [(2.0, pytest.approx(100 / 3)), (3.0, pytest.approx(50))]


def test_the_present_threshold_gives_the_figures_of_the_evaluation():
    random_ = random.Random(0)
    words = [word for word in CONTEXT.split() if word != "the"]  # of which the metric leaves nothing
    examples, predictions, odds, best = [], {}, {}, {}
    for i in range(50):
        text = random_.choice(words)
        answers = (text,) if random_.random() < 0.6 else ()
        examples.append(Example(f"q{i}", "Who?", CONTEXT, answers, (CONTEXT.index(text),) * len(answers)))
        found = text if random_.random() < 0.5 else random_.choice(words)
        odds[f"q{i}"] = random_.uniform(-2, 2)
        predictions[f"q{i}"] = "" if odds[f"q{i}"] > 0.25 else found
        best[f"q{i}"] = [{"text": "", "probability": 0.4}, answer(CONTEXT, found, 0.3)]
    files = {"predictions.json": predictions, "nbest_predictions.json": best, "null_odds.json": odds}
    result = review(examples, np.ones(50, dtype=np.int64), files, 0.25)
    official = score_predictions(predictions, {one.id: one.answers for one in examples}, v2=True)
    (everything,) = breakdowns(result)[0].rows
    assert everything.means == pytest.approx([official["exact"], official["f1"]])
    (table,), (curve,) = result.tables, result.curves
    rows: Any = {row[0]: row[1:] for row in table.rows}
    suppressed = sum(not text for text in predictions.values())
    assert rows["present"] == pytest.approx((0.25, official["exact"], official["f1"], suppressed))
    assert curve.marked["present"] == 0.25
    for name, column in (("EM", 2), ("F1", 3)):
        highest = max(y for _, y in curve.series[name])
        assert highest >= rows["present"][column - 1]
        assert rows[f"best {name}"][column - 1] == pytest.approx(highest)
        assert curve.marked[f"best {name}"] == rows[f"best {name}"][0]
    assert result.groupings["answer"] == ("has one", "has none")
    outcomes = [one.outcomes for one in result.examples]
    assert sum("no_answer_predicted" in one for one in outcomes) == suppressed
    assert sum("has_no_answer" in one for one in outcomes) == sum(not one.answers for one in examples)


def test_examples_without_any_candidate_do_not_stretch_the_curve():
    curve = threshold_curve(np.array([1.0, 0.0]), np.array([-1.0, 1e6]), np.array([True, True]))
    assert [x for x, _ in curve] == [pytest.approx(-1, abs=1e-3), -1.0]


# ----------------------------------------------------------------------------------------------- comparing


def example_of(id: str, predicted: str, right: bool, text: str = "t", expected: str = "e") -> ReviewedExample:
    return ReviewedExample(id, "h", text, (expected,), predicted, right, {"f1": 100.0 * right}, {"kind": "a"})


def review_of(*examples: ReviewedExample) -> Review:
    return Review(list(examples), ("question", "context"), "no answer", {"f1": "F1"}, {"kind": ("a", "b")})


def test_examples_of_two_runs_are_matched_by_id():
    here = review_of(
        example_of("1", "e", True),
        example_of("2", "x", False),
        example_of("3", "e", True),
        example_of("4", "y", False),
        example_of("5", "e", True, text="another"),
        example_of("6", "e", True, expected="another"),
        example_of("7", "e", True),
    )
    there = review_of(
        example_of("8", "x", False),
        example_of("4", "x", False),
        example_of("3", "e", True),
        example_of("2", "e", True),
        example_of("1", "x", False),
        example_of("5", "e", True),
        example_of("6", "e", True),
    )
    found = Comparison.of(here, there)
    assert (found.fixed, found.broken, found.changed) == (1, 1, 3)
    assert (len(found.pairs), found.only_here, found.only_there) == (6, 1, 1)
    assert found.differing == {"5", "6"}
    everything, by_kind = breakdowns(here, found)
    assert (everything.rows[0].count, everything.rows[0].means, everything.rows[0].other) == (
        6,
        [pytest.approx(100 * 4 / 6)],
        [pytest.approx(100 * 4 / 6)],
    )
    assert [row.name for row in by_kind.rows] == ["a"]
    told = " ".join(found.notes)
    assert "6 examples are in both runs, 1 only in this one and 1 only in the other" in told
    assert "2 examples have the same id in both runs, but not the same text" in told


def test_the_task_s_own_files_are_what_an_evaluation_leaves():
    data = DataConfig.model_validate({"synthetic": {"train_examples": 5, "validation_examples": 3}})
    task = load_task(RunConfig(data=data, model=ModelConfig(config=TINY_BERT, vocab_size=300)))
    assert task.evaluation_files == ("predictions.json", "nbest_predictions.json", "null_odds.json")
