"""Entities as labels of words: IOB2 (Ramshaw and Marcus 1995; Tjong Kim Sang and Veenstra 1999).

`B-TYPE` is an entity's first word, `I-TYPE` each further one, `O` a word of none. What breaks these rules is read as
conlleval, the script of the CoNLL shared tasks, reads it: an `I-TYPE` behind `O`, or behind an entity of another type,
begins an entity. So texts in IOB1, where `B-` stands only between neighbours of one type, are read as they are meant.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"


class Entity(NamedTuple):
    """A part of a sentence, `words[start:end]`."""

    type: str
    start: int
    end: int


def is_label(text: str) -> bool:
    """Whether it is `O`, or `B-` or `I-` and a type, which neither begins nor ends with a blank."""
    return text == OUTSIDE or (text[:2] in ("B-", "I-") and text[2:].strip() == text[2:] != "")


def type_of(label: str) -> str:
    """Empty for `O`."""
    return label[2:]


def entities_of(labels: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, in order; every label has to be one by `is_label`."""
    found: list[Entity] = []
    start = 0
    before = ""
    for i, label in enumerate((*labels, OUTSIDE)):
        own = type_of(label)
        if before and (own != before or label[0] == "B"):
            found.append(Entity(before, start, i))
        if own and (own != before or label[0] == "B"):
            start = i
        before = own
    return found


def labels_for(entities: Iterable[Entity], words: int) -> tuple[str, ...]:
    """The labels of a sentence of so many words with these entities, which do not overlap."""
    labels = [OUTSIDE] * words
    for type_, start, end in entities:
        labels[start:end] = [f"B-{type_}", *[f"I-{type_}"] * (end - start - 1)]
    return tuple(labels)


def loose_starts(labels: Sequence[str]) -> list[int]:
    """Positions of `I-` labels that begin an entity."""
    return [entity.start for entity in entities_of(labels) if labels[entity.start][0] == "I"]


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Those that there are and `O`, each once: `O`, then type by type."""
    return (OUTSIDE, *sorted(set(labels) - {OUTSIDE}, key=lambda label: (type_of(label), label)))


def types_of(labels: Iterable[str]) -> list[str]:
    """All types, in the order of `labels`."""
    return [one for one in dict.fromkeys(type_of(label) for label in labels) if one]
