"""Files of predicted entities, scored as conlleval does."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qa_dist.config import RunConfig
from qa_dist.errors import UserError
from qa_dist.tasks.predictions import read_mapping, unmatched
from qa_dist.tasks.reading import Record, content, decoded
from qa_dist.tasks.token_classification import reading
from qa_dist.tasks.token_classification.data import Example, check_records
from qa_dist.tasks.token_classification.metric import score_labels
from qa_dist.tasks.token_classification.scheme import OUTSIDE, Entity, labels_for
from qa_dist.tasks.token_classification.splits import Split


def score_file(config: RunConfig, predictions_file: Path) -> tuple[dict[str, float], list[str]]:
    """The figures for `predictions_file` on the validation examples, as `score_labels` calls them, and notes for the
    user.

    The file is a predictions.json as evaluation writes it (then there is no accuracy), or the same sentences again, in
    any form of the data, with the predicted tags. Raises `UserError` for files that cannot be used.
    """
    source = Split(config.data, "validation")
    examples = source.loaded
    expected = {example.id: example.labels for example in examples.items}
    notes = list(examples.notes)
    has_labels = not _is_mapping(predictions_file, config.data.columns.get("tokens", "tokens"))
    if not has_labels:
        found = read_mapping(predictions_file, "list")
        ids = list(found)
        known = [example for example in examples.items if example.id in found]
        predicted = {
            one.id: labels_for(_entities(one, found[one.id], predictions_file), len(one.words)) for one in known
        }
    else:
        records = _read(predictions_file, config.data.columns)
        tagged = check_records(records, str(predictions_file), names=source.names)
        notes += [f"{predictions_file}: {note}" for note in tagged.notes]
        own = {example.id: example for example in tagged.items}
        ids = list(own)
        _require_same_words(examples.items, own)
        predicted = {id: example.labels for id, example in own.items()}
    notes += unmatched(str(predictions_file), ids, list(expected), "sentence", "score as if no entity were found")
    rows = [predicted.get(id, (OUTSIDE,) * len(labels)) for id, labels in expected.items()]
    figures = score_labels(rows, list(expected.values()))
    if not has_labels:
        del figures["accuracy"]  # which is that of labels; those of an entity's words are not in the file
    return figures, notes


def _read(path: Path, columns: Mapping[str, str]) -> list[Record]:
    """The file's sentences: its columns are those of the data, or else the usual ones."""
    try:
        return reading.read_file(path, columns)
    except UserError:
        if not columns:
            raise
        with contextlib.suppress(UserError):
            return reading.read_file(path, {})
        raise


def _is_mapping(path: Path, tokens: str) -> bool:
    """Whether the file is a JSON object that is no example itself."""
    try:
        found = json.loads(decoded(path, content(path)))
    except (ValueError, RecursionError, UserError):
        return False
    return isinstance(found, dict) and tokens not in found and "data" not in found


def _entities(example: Example, rows: list[Any], path: Path) -> list[Entity]:
    """What the file has for a sentence, checked."""
    found: list[Entity] = []
    for row in rows:
        row = row if isinstance(row, dict) else {}
        type_, start, end = (row.get(name) for name in ("type", "start", "end"))
        if not (isinstance(type_, str) and type_ and type(start) is int and type(end) is int):
            raise UserError(f"{path}: {example.id!r} has an entity without type (a text), start and end (words)")
        overlaps = any(start < other.end and other.start < end for other in found)
        if not 0 <= start < end <= len(example.words) or overlaps:
            raise UserError(
                f"{path}: {example.id!r} has an entity from word {start} to {end}, which is not within its "
                f"{len(example.words)} words, or overlaps with another one"
            )
        found.append(Entity(type_, start, end))
    return found


def _require_same_words(examples: list[Example], predictions: dict[str, Example]) -> None:
    for example in examples:
        other = predictions.get(example.id)
        if other is not None and other.words != example.words:
            pairs = zip(example.words, other.words, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(example.words), len(other.words)) - 1)
            raise UserError(
                f"{other.where(first)}: has other words than {example.where(first)}; a file of predicted tags has the "
                "sentences of the data, word for word"
            )
