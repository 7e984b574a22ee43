"""What the page's script is given: examples and the figures of the charts, as JSON that is safe inside HTML."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from qa_dist.reporting.report.breakdown import Comparison
from qa_dist.reporting.report.charts import Chart
from qa_dist.tasks.task import Alternative, Review, ReviewedExample

LEAST_PROBABILITY = 0.001
"""Alternatives that are less likely are left out, but for the first few."""
FEW = 3


def as_script(content: Any) -> Markup:
    """`content` as JSON for a <script type="application/json">: ASCII alone, and no "<", which could end it."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def page_data(charts: Sequence[Chart], review: Review | None, comparison: Comparison | None) -> dict[str, Any]:
    """What page.js reads. Examples are columns, each with a value for every example; texts are there once."""
    content: dict[str, Any] = {"charts": {one.id: one.values for one in charts}}
    if review is None:
        return content
    examples = review.examples
    texts = {text: i for i, text in enumerate(dict.fromkeys(example.text for example in examples))}
    groups = {name: {group: i for i, group in enumerate(all_of)} for name, all_of in review.groupings.items()}
    outcomes = {name: i for i, name in enumerate(review.outcomes)}
    content |= {
        "names": review.names,
        "nothing": review.nothing,
        "figures": list(review.figures.items()),
        "outcomes": list(review.outcomes),
        "groupings": [[name, list(all_of)] for name, all_of in groups.items()],
        "texts": list(texts),
        "examples": _outputs(examples, review)
        | {
            "id": [example.id for example in examples],
            "heading": [example.heading for example in examples],
            "text": [texts[example.text] for example in examples],
            "expected": [example.expected for example in examples],
            "groups": [[groups[name].get(example.groups.get(name, ""), -1) for name in groups] for example in examples],
            "outcomes": [[outcomes[name] for name in example.outcomes if name in outcomes] for example in examples],
            "gold": _marks(examples, "gold"),
        },
    }
    if comparison is not None:
        content["other"] = _other(examples, review, comparison)
    return content


def _outputs(examples: Sequence[ReviewedExample | None], review: Review) -> dict[str, Any]:
    """The columns that are the model's, of one run or the other; None where that has no such example."""

    def column(value: Callable[[ReviewedExample], Any]) -> list[Any]:
        return [None if example is None else value(example) for example in examples]

    return {
        "predicted": column(lambda example: example.predicted),
        "right": column(lambda example: int(example.is_right)),
        "values": column(lambda example: [round(example.figures[name], 2) for name in review.figures]),
        "confidence": column(lambda example: None if example.confidence is None else round(example.confidence, 4)),
        "found": _marks(examples, "predicted"),
        "alternatives": column(lambda example: _alternatives(example.alternatives)),
    }


def _other(examples: Sequence[ReviewedExample], review: Review, comparison: Comparison) -> dict[str, Any]:
    """What the run that is compared with says of each example of this one."""
    others = {a.id: b for a, b in comparison.pairs}
    there = [others.get(example.id) for example in examples]
    columns = _outputs(there, review)
    columns["differs"] = [int(example.id in comparison.differing) for example in examples]
    for i, (here, other) in enumerate(zip(examples, there, strict=True)):
        if other is not None and other.text != here.text:
            columns["found"][i] = []  # places in another text
            columns["alternatives"][i] = _alternatives(other.alternatives, has_places=False)
    return columns


def _marks(examples: Sequence[ReviewedExample | None], kind: str) -> list[Any]:
    """For each example a list of start, end and, where there is one, label."""
    return [
        [[mark.start, mark.end, *([mark.label] if mark.label else [])] for mark in example.marks if mark.kind == kind]
        if example is not None
        else None
        for example in examples
    ]


def _alternatives(alternatives: Sequence[Alternative], has_places: bool = True) -> list[Any]:
    """For each the probability, and start and end or, where it does not stand in the text, the text; then the number
    of those that are left out."""
    kept = [one for i, one in enumerate(alternatives) if i < FEW or one.probability >= LEAST_PROBABILITY]
    rows: list[Any] = [
        [round(one.probability, 4), *(one.span if one.span and has_places else (one.text,))] for one in kept
    ]
    return [*rows, len(alternatives) - len(kept)]
