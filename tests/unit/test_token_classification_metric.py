"""Precision, recall and F1 of entities equal conlleval's and seqeval's, whatever the labels are."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_dist.tasks.token_classification.evaluate_metric import EntityMetric
from qa_dist.tasks.token_classification.metric import score_labels
from qa_dist.tasks.token_classification.scheme import OUTSIDE, Entity, entities_of, in_order, is_label, loose_starts
from tests.seqeval_figures import FILE

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-creative-work", "I-creative-work"]


@st.composite
def sentences(draw: st.DrawFn) -> tuple[list[list[str]], list[list[str]]]:
    """Predictions and references of a few sentences, many of them against the rules."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    expected = [draw(st.lists(st.sampled_from(LABELS), min_size=n, max_size=n)) for n in lengths]
    # alike, so that there are entities in common
    changes = [draw(st.lists(st.sampled_from([None, None, None, *LABELS]), min_size=n, max_size=n)) for n in lengths]
    found = [[b or a for a, b in zip(*pair, strict=True)] for pair in zip(expected, changes, strict=True)]
    return found, expected


def conlleval(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """What the CoNLL-2000 script's state machine counts, word by word, for entities of B- and I- labels."""

    def starts(before: str, label: str) -> bool:
        return label != "O" and (label[0] == "B" or before == "O" or before[2:] != label[2:])

    def ends(label: str, behind: str) -> bool:
        return label != "O" and (behind == "O" or behind[0] == "B" or behind[2:] != label[2:])

    right = found = expected = 0
    for own, wanted in zip(predictions, references, strict=True):
        inside = False
        for i in range(len(own)):
            before = [labels[i - 1] if i else "O" for labels in (own, wanted)]
            behind = [labels[i + 1] if i + 1 < len(own) else "O" for labels in (own, wanted)]
            begin = [starts(before[0], own[i]), starts(before[1], wanted[i])]
            end = [ends(own[i], behind[0]), ends(wanted[i], behind[1])]
            found, expected = found + begin[0], expected + begin[1]
            if all(begin) and own[i][2:] == wanted[i][2:]:
                inside = True
            elif any(begin):
                inside = False
            if inside and any(end):
                right += all(end)
                inside = False
    return {
        "precision": 100 * right / found if found else 0.0,
        "recall": 100 * right / expected if expected else 0.0,
        "f1": 200 * right / (found + expected) if right else 0.0,
    }


@given(sentences())
@settings(max_examples=500, deadline=None)
def test_figures_equal_conllevals(pair: tuple[list[list[str]], list[list[str]]]):
    figures = score_labels(*pair)
    assert {name: figures[name] for name in ("precision", "recall", "f1")} == pytest.approx(conlleval(*pair), rel=1e-12)


@pytest.fixture(scope="module")
def seqeval() -> list[dict[str, Any]]:
    """Return figures of seqeval 1.2.2, which tests/seqeval_figures.py has recorded."""
    cases = json.loads(FILE.read_text())["cases"]
    for case in cases:
        for key in ("predictions", "references"):
            case[key] = [[case["labels"][int(digit)] for digit in sentence] for sentence in case[key]]
    return cases


def without_loose(labels: Sequence[str]) -> list[str]:
    """Return `labels` with O in place of each entity that begins with I-: strict IOB2 knows no such entities."""
    loose = set(loose_starts(labels))
    outside = {i for entity in entities_of(labels) if entity.start in loose for i in range(entity.start, entity.end)}
    return [OUTSIDE if i in outside else label for i, label in enumerate(labels)]


def require_seqevals(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], recorded: dict[str, list[float]]
) -> None:
    own = score_labels(predictions, references)
    assert {name.removesuffix("_number") for name in own if name.endswith("_number")} == set(recorded) - {""}
    for name, (precision, recall, f1, *number) in recorded.items():
        prefix = f"{name}_" if name else ""
        assert own[f"{prefix}precision"] == pytest.approx(100 * precision, rel=1e-12)
        assert own[f"{prefix}recall"] == pytest.approx(100 * recall, rel=1e-12)
        assert own[f"{prefix}f1"] == pytest.approx(100 * f1, rel=1e-12)
        assert not number or [own[f"{prefix}number"]] == number


def test_figures_equal_seqevals(seqeval: list[dict[str, Any]]):
    """In its default mode, which reads ill-formed sequences as conlleval does."""
    for case in seqeval:
        require_seqevals(case["predictions"], case["references"], case["default"])
        accuracy = score_labels(case["predictions"], case["references"])["accuracy"]
        assert accuracy == pytest.approx(100 * case["accuracy"], rel=1e-12)


def test_entities_that_begin_with_b_equal_seqevals_strict_iob2(seqeval: list[dict[str, Any]]):
    for case in seqeval:
        predictions, references = ([without_loose(row) for row in case[key]] for key in ("predictions", "references"))
        require_seqevals(predictions, references, case["strict"])


def test_the_recorded_cases_differ(seqeval: list[dict[str, Any]]):
    """With and without ill-formed sequences, right and wrong; else the comparisons above would say little."""
    different = [case for case in seqeval if case["default"] != case["strict"]]
    assert 0.3 * len(seqeval) < len(different) < 0.7 * len(seqeval)
    assert any(0 < case["default"][""][2] < 1 for case in different)
    assert {len(case["labels"]) for case in seqeval} == {3, 5, 7, 9}
    for case in seqeval:
        if not any(loose_starts(row) for key in ("predictions", "references") for row in case[key]):
            assert case["default"] == case["strict"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("O B-A I-A O", [("A", 1, 3)]),
        ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]),
        ("I-A I-A O I-A", [("A", 0, 2), ("A", 3, 4)]),
        ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),
        ("I-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("B-x-y I-x-y", [("x-y", 0, 2)]),
        ("O", []),
        ("", []),
    ],
)
def test_entities(labels: str, expected: list[tuple[str, int, int]]):
    assert entities_of(labels.split()) == [Entity(*one) for one in expected]


def test_loose_starts():
    assert loose_starts(["I-A", "I-A", "O", "I-A", "B-A", "I-B"]) == [0, 3, 5]


def test_labels():
    assert [is_label(text) for text in ("O", "B-x", "I-x-y", "B-", "o", "E-x", "B_x", "")] == [True] * 3 + [False] * 5
    assert in_order(["I-b", "B-b", "B-a"]) == ("O", "B-a", "B-b", "I-b")


def test_figures_by_hand():
    expected = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "B-LOC"]]
    found = [["B-PER", "I-PER", "O", "B-PER"], ["O", "B-LOC", "I-LOC"]]
    figures = score_labels(found, expected, ["PER", "LOC", "ORG"])
    assert figures == pytest.approx(
        {"precision": 100 / 3, "recall": 25, "f1": 200 / 7, "accuracy": 500 / 7}
        | {"PER_precision": 50, "PER_recall": 100, "PER_f1": 200 / 3, "PER_number": 1}
        | {"LOC_precision": 0, "LOC_recall": 0, "LOC_f1": 0, "LOC_number": 3}
        | {"ORG_precision": 0, "ORG_recall": 0, "ORG_f1": 0, "ORG_number": 0}
    )


def test_the_metric_of_evaluate():
    metric = EntityMetric()
    metric.add_batch(predictions=[["B-PER", "O"]], references=[["B-PER", "O"]])
    metric.add_batch(predictions=[["O"]], references=[["B-LOC"]])
    figures = metric.compute()
    assert figures == pytest.approx(score_labels([["B-PER", "O"], ["O"]], [["B-PER", "O"], ["B-LOC"]]))
    with pytest.raises(ValueError, match="not labels of IOB2: S-PER"):
        metric.compute(predictions=[["S-PER"]], references=[["O"]])
