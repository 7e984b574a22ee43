"""What an evaluation of token classification found, sentence by sentence."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qa_dist.errors import UserError
from qa_dist.tasks.predictions import unmatched
from qa_dist.tasks.task import Mark, Review, ReviewedExample, ReviewTable
from qa_dist.tasks.token_classification.data import Example
from qa_dist.tasks.token_classification.metric import score_entities
from qa_dist.tasks.token_classification.scheme import Entity, entities_of

PREDICTIONS = "predictions.json"
# no type of entities gives rise to metrics of these names
FIGURES = {"sentence_accuracy": "all right", "f1_of_sentence": "F1 of the sentence"}
OUTCOMES = {
    "missed": "an entity missed",
    "invented": "an entity where none is",
    "borders": "wrong borders",
    "type": "wrong type",
}
MISSED, BORDERS, INVENTED = "nothing", "other borders", "nothing there"
HEADING_WORDS = 12

NUMBERS = ("0", "1", "2", "3", "4+")
WORDS = {"1–10": 10, "11–20": 20, "21–30": 30, "31–50": 50, "51–100": 100, "101+": math.inf}
WINDOWS = ("1", "2", "3", "4+")


def review(examples: Sequence[Example], windows: Sequence[int], files: Mapping[str, Any]) -> Review:
    """The review of `examples`, of which each has so many `windows`. Raises `UserError` where `files` hold no
    predictions of these examples."""
    rows = files.get(PREDICTIONS)
    lists = {key: found for key, found in rows.items() if isinstance(found, list)} if isinstance(rows, dict) else {}
    if not lists:
        raise UserError(f"{PREDICTIONS}: there are none that can be read; evaluate the model (qa-dist evaluate)")
    ids = [example.id for example in examples]
    notes = unmatched(PREDICTIONS, lists, ids, "sentence", "are left out")
    given = {
        example.id: _entities(lists[example.id], len(example.words)) for example in examples if example.id in lists
    }
    known = [
        (example, entities_of(example.labels), given[example.id], count)
        for example, count in zip(examples, windows, strict=True)
        if example.id in given
    ]
    pairs = [(expected, found) for _, expected, found, _ in known]
    return Review(
        [_reviewed(*one) for one in known],
        ("sentence", "text"),
        "no entity",
        FIGURES,
        {"entities": NUMBERS, "words": list(WORDS), "windows": WINDOWS},
        dict(OUTCOMES),
        tables=[_confusion(pairs), _by_type(pairs)],
        notes=notes,
    )


def _entities(rows: list[Any], words: int) -> list[Entity]:
    """Those of a sentence of so many words that a file has, whose content is not to be trusted."""
    found = []
    for row in rows:
        row = row if isinstance(row, dict) else {}
        type_, start, end = row.get("type"), row.get("start"), row.get("end")
        if isinstance(type_, str) and type(start) is int and type(end) is int and 0 <= start < end <= words:
            found.append(Entity(type_, start, end))
    return found


def _reviewed(example: Example, expected: list[Entity], found: list[Entity], windows: int) -> ReviewedExample:
    starts, text = [], ""
    for word in example.words:
        starts.append(len(text))
        text += f"{word} "
    own, wanted = set(found), set(expected)
    pairs = _paired(expected, found)
    outcomes = {
        "missed": any(outcome == MISSED for _, outcome in pairs),
        "invented": any(outcome == INVENTED for outcome, _ in pairs),
        "borders": any(outcome == BORDERS for _, outcome in pairs),
        "type": any(a != b and a != INVENTED and b not in (MISSED, BORDERS) for a, b in pairs),
    }

    def mark(kind: Any, entity: Entity) -> Mark:
        last = entity.end - 1
        return Mark(kind, starts[entity.start], starts[last] + len(example.words[last]), entity.type)

    f1 = score_entities(len(own & wanted), len(own), len(wanted))["f1"] if own or wanted else 100.0
    heading = " ".join(example.words[:HEADING_WORDS])
    return ReviewedExample(
        id=example.id,
        heading=heading + (" …" if len(example.words) > HEADING_WORDS else ""),
        text=text[:-1],
        expected=(_text(example, expected),) if expected else (),
        predicted=_text(example, found),
        is_right=own == wanted,
        figures={"sentence_accuracy": 100.0 * (own == wanted), "f1_of_sentence": f1},
        groups={
            "entities": NUMBERS[min(len(expected), 4)],
            "words": next(name for name, bound in WORDS.items() if len(example.words) <= bound),
            "windows": WINDOWS[min(windows, 4) - 1],
        },
        outcomes=tuple(name for name, holds in outcomes.items() if holds),
        marks=tuple([mark("gold", entity) for entity in expected] + [mark("predicted", entity) for entity in found]),
    )


def _text(example: Example, entities: Sequence[Entity]) -> str:
    return "; ".join(f"{' '.join(example.words[e.start : e.end])} ({e.type})" for e in entities)


def _paired(expected: Sequence[Entity], found: Sequence[Entity]) -> list[tuple[str, str]]:
    """For each expected entity its type and that of the one that was found in its place, `BORDERS` where one overlaps
    with it, `MISSED` where none does; then `INVENTED` and its type for each found one that overlaps with none."""

    def overlap(a: Entity, b: Entity) -> bool:
        return a.start < b.end and b.start < a.end

    pairs = []
    for entity in expected:
        same = [other.type for other in found if other[1:] == entity[1:]]
        near = any(overlap(entity, other) for other in found)
        pairs.append((entity.type, same[0] if same else BORDERS if near else MISSED))
    alone = [other for other in found if not any(overlap(entity, other) for entity in expected)]
    return pairs + [(INVENTED, other.type) for other in alone]


def _confusion(sentences: Sequence[tuple[list[Entity], list[Entity]]]) -> ReviewTable:
    counts = Counter(pair for expected, found in sentences for pair in _paired(expected, found))
    rows = sorted({a for a, _ in counts} - {INVENTED})
    columns = sorted({b for _, b in counts} - {BORDERS, MISSED} | set(rows))
    header = ("expected, and what was found there", *columns, BORDERS, MISSED)
    return ReviewTable(
        "Types",
        header,
        [(row, *(counts[row, column] for column in (*columns, BORDERS, MISSED))) for row in (*rows, INVENTED)],
    )


def _by_type(sentences: Sequence[tuple[list[Entity], list[Entity]]]) -> ReviewTable:
    found, expected, right = (
        Counter(entity.type for a, b in sentences for entity in choose(set(a), set(b)))
        for choose in (lambda a, b: b, lambda a, b: a, lambda a, b: a & b)
    )
    rows: list[tuple[str | float, ...]] = []
    for name in sorted({*found, *expected}):
        figures = score_entities(right[name], found[name], expected[name])
        rows.append((name, expected[name], found[name], *figures.values()))
    total = score_entities(right.total(), found.total(), expected.total())
    rows.append(("all", expected.total(), found.total(), *total.values()))
    return ReviewTable("Figures by type", ("type", "expected", "found", "precision", "recall", "F1"), rows)
