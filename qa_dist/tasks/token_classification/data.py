"""Sentences with labelled words, checked before anything depends on them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qa_dist.errors import UserError, listing
from qa_dist.tasks.reading import Record, ids_of, is_unicode, require_different, require_none_wrong
from qa_dist.tasks.splits import Examples
from qa_dist.tasks.token_classification.scheme import is_label, loose_starts

NO_TAG = "a tag is neither O nor B- or I- and a type (IOB2), or not in the column that data.columns says"
LONG_SENTENCE = 300
"""Words from which on a file of a single sentence may lack the lines that divide its sentences."""


@dataclass(frozen=True, slots=True)
class Example:
    """A sentence, or any other text, in words."""

    id: str
    words: tuple[str, ...]
    labels: tuple[str, ...]
    """Of each word; empty where none are known."""
    place: str
    """Where it stands, for messages."""
    line: int | None = None
    """The line of its first word, where each word has a line."""

    def where(self, word: int) -> str:
        """Where a word stands."""
        if self.line is None:
            return f"{self.place}, token {word + 1}"
        return f"{self.place.removesuffix(f':{self.line}')}:{self.line + word}"


def check_records(
    records: Sequence[Record], name: str, *, labelled: bool = True, names: Sequence[str] = ()
) -> Examples[Example]:
    """Turn records into examples, or raise one `UserError` that lists all that is wrong with them.

    `names` are those of tags that are numbers, from 0; where `labelled` is false, tags are not looked at.
    """
    wrong: dict[str, list[str]] = defaultdict(list)
    notes: list[str] = []
    ids = ids_of(records, wrong, notes)
    if records and all("line" in record.values for record in records):
        notes.clear()  # that sentences in columns have no ids is no remark worth making
    if comments := [place for record in records for place in record.values.get("comments", ())]:
        notes.append(f"{len(comments):,} lines that begin with # are taken for comments ({listing(comments, limit=3)})")
    examples = [_example(record, id, labelled, names, wrong) for record, id in zip(records, ids, strict=True)]
    require_different(ids, records, wrong)
    require_none_wrong(name, wrong)
    found = [example for example in examples if example is not None]
    if not found:
        raise UserError(f"{name}: there is no example")
    if len(found) == 1 and found[0].line is not None and len(found[0].words) > LONG_SENTENCE:
        notes.append(f"{name} are one sentence of {len(found[0].words):,} words; blank lines divide sentences")
    loose = [example.where(word) for example in found for word in loose_starts(example.labels)]
    if loose:
        notes.append(
            f"{len(loose):,} entities begin with I- and not with B- ({listing(loose, limit=3)}); they are taken for "
            "entities of their own, as conlleval does"
        )
    return Examples(found, notes)


def _example(
    record: Record, id: str, labelled: bool, names: Sequence[str], wrong: dict[str, list[str]]
) -> Example | None:
    words, line = record.values.get("tokens"), record.values.get("line")
    if not isinstance(words, list) or not words:
        wrong["tokens is missing, empty or not a list"].append(record.place)
        return None
    example = Example(id, tuple(words), (), record.place, line)
    for i, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            wrong["a token is empty or not a text"].append(example.where(i))
        elif not is_unicode(word):
            wrong["a token holds half of a surrogate pair, which is no character"].append(example.where(i))
    if not labelled:
        return example
    tags = record.values.get("ner_tags")
    if not isinstance(tags, list) or len(tags) != len(words):
        count = f"{len(tags)} of {len(words)}" if isinstance(tags, list) else "none"
        wrong["ner_tags is not a list with a tag for each token"].append(f"{record.place}: {count}")
        return None
    labels = tuple(_label(tag, names, example.where(i), wrong) for i, tag in enumerate(tags))
    return Example(id, tuple(words), labels, record.place, line)


def _label(tag: Any, names: Sequence[str], where: str, wrong: dict[str, list[str]]) -> str:
    if isinstance(tag, str) and tag.isascii() and tag.isdecimal():  # columns hold nothing but texts
        tag = int(tag)
    if isinstance(tag, int) and not isinstance(tag, bool):
        if not names:
            wrong["a tag is a number, and nothing names it (data.labels does, in the order of the numbers)"].append(
                where
            )
            return ""
        if not 0 <= tag < len(names):
            wrong[f"a tag is a number that none of the {len(names)} labels has"].append(f"{tag} at {where}")
            return ""
        tag = names[tag]
    if not isinstance(tag, str) or not is_label(tag) or not is_unicode(tag):
        wrong[NO_TAG].append(f"{tag!r} at {where}")
        return ""
    return tag
