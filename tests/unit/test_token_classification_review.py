"""What the review says of sentences, and that no content of a file breaks it."""

from typing import Any

import pytest

from qa_dist.errors import UserError
from qa_dist.tasks.token_classification.data import Example
from qa_dist.tasks.token_classification.review import review


def example(id: str, text: str) -> Example:
    """`Ada/B-PER lives/O`."""
    pairs = [part.rsplit("/", 1) for part in text.split()]
    return Example(id, tuple(word for word, _ in pairs), tuple(label for _, label in pairs), id)


EXAMPLES = [
    example("right", "Ada/B-PER lives/O in/O New/B-LOC York/I-LOC"),
    example("nothing", "No/O"),
    example("type", "Ford/B-ORG fell/O"),
    example("borders", "in/O New/B-LOC York/I-LOC"),
    example("missed", "Bo/B-PER met/O Ida/B-PER"),
    example("invented", "In/O May/O"),
]


def found(type_: str, start: int, end: int) -> dict[str, Any]:
    return {"type": type_, "start": start, "end": end, "text": "", "score": 0.5}


PREDICTIONS = {
    "right": [found("PER", 0, 1), found("LOC", 3, 5)],
    "nothing": [],
    "type": [found("PER", 0, 1)],
    "borders": [found("LOC", 2, 3)],
    "missed": [found("PER", 2, 3)],
    "invented": [found("PER", 1, 2)],
}


def test_sentences():
    result = review(EXAMPLES, [1, 1, 1, 1, 1, 7], {"predictions.json": PREDICTIONS})
    by_id = {one.id: one for one in result.examples}
    assert {name: one.outcomes for name, one in by_id.items()} == {
        "right": (),
        "nothing": (),
        **{name: (name,) for name in ("type", "borders", "missed", "invented")},
    }
    assert set(result.outcomes) == {"type", "borders", "missed", "invented"}
    assert [name for name, one in by_id.items() if one.is_right] == ["right", "nothing"]
    assert {name: one.figures["f1_of_sentence"] for name, one in by_id.items()} == pytest.approx(
        {"right": 100, "nothing": 100, "type": 0, "borders": 0, "missed": 200 / 3, "invented": 0}
    )
    right = by_id["right"]
    assert right.expected == (right.predicted,) == ("Ada (PER); New York (LOC)",)
    assert by_id["nothing"].expected == () and by_id["nothing"].predicted == ""
    marked = [(mark.kind, right.text[mark.start : mark.end], mark.label) for mark in right.marks]
    assert marked == [(kind, *one) for kind in ("gold", "predicted") for one in (("Ada", "PER"), ("New York", "LOC"))]
    assert right.groups == {"entities": "2", "words": "1–10", "windows": "1"}
    assert by_id["invented"].groups["windows"] == "4+"
    for one in result.examples:
        assert all(one.groups[name] in result.groupings[name] for name in result.groupings)


def test_tables():
    types, figures = review(EXAMPLES, [1] * 6, {"predictions.json": PREDICTIONS}).tables
    header, rows = types.header[1:], {row[0]: dict(zip(types.header[1:], row[1:], strict=True)) for row in types.rows}
    assert header == ("LOC", "ORG", "PER", "other borders", "nothing")
    counts = {(row, column): value for row, cells in rows.items() for column, value in cells.items() if value}
    assert counts == {
        ("LOC", "LOC"): 1,
        ("LOC", "other borders"): 1,
        ("ORG", "PER"): 1,
        ("PER", "PER"): 2,
        ("PER", "nothing"): 1,
        ("nothing there", "PER"): 1,
    }
    assert [row[:3] for row in figures.rows] == [("LOC", 2, 2), ("ORG", 1, 0), ("PER", 3, 4), ("all", 6, 6)]
    assert figures.rows[-1][3:] == pytest.approx((50, 50, 50))


@pytest.mark.parametrize("content", [None, {}, [], 5, "x", {"right": 5}, {"other": []}])
def test_files_without_predictions_of_these_examples(content: Any):
    with pytest.raises(UserError, match=r"predictions\.json: "):
        review(EXAMPLES, [1] * 6, {"predictions.json": content})


def test_what_is_no_entity_is_left_out():
    strange = [
        5,
        None,
        {},
        found("PER", 0, 9),
        found("PER", -1, 1),
        found("PER", 1, 1),
        {"type": 5, "start": 0, "end": 1},
    ]
    strange += [{"type": "PER", "start": True, "end": 2}, {"type": "PER", "start": 0.0, "end": 1}]
    files = {"predictions.json": {"right": [*PREDICTIONS["right"], *strange], "stranger": [], "type": "x"}}
    result = review(EXAMPLES, [1] * 6, files)
    (only,) = result.examples
    assert only.is_right
    assert result.notes[0].startswith("5 sentences have no prediction and are left out (nothing, type, borders")
    assert result.notes[1] == "1 predictions are for no sentence of these data (stranger)"
