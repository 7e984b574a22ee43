"""Files of predictions: id -> what is predicted, whatever the task."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from qa_dist.errors import UserError, listing
from qa_dist.tasks.reading import content, decoded, json_error

KINDS: dict[str, tuple[type, ...]] = {"text": (str,), "number": (int, float), "list": (list,)}


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """A JSON file of id -> value, all of one of `KINDS`. Raises `UserError` for one that is something else."""
    try:
        found = json.loads(decoded(path, content(path)))
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise UserError(f"{path}:{line}: is not valid JSON: {json_error(error)}") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: has to be a JSON object that gives a {kind} for every example's id")
    wrong = [key for key, value in found.items() if not isinstance(value, KINDS[kind]) or isinstance(value, bool)]
    if wrong:
        others = {type(found[key]) for key in wrong}
        hint = "; lists of entities are for --task token_classification" if kind == "text" and others == {list} else ""
        raise UserError(f"{path}: {len(wrong):,} ids have something else than a {kind} ({listing(wrong)}){hint}")
    return found


def unmatched(name: str, predictions: Collection[str], ids: Sequence[str], kind: str, consequence: str) -> list[str]:
    """Notes on which of the examples' `ids` have no prediction, and which `predictions` are for none of the examples.

    `kind` is how an example is called; `consequence` says what becomes of those without a prediction. Raises
    `UserError` where none has one: the file, called `name`, was made for other data.
    """
    known = set(ids)
    missing = [one for one in ids if one not in predictions]
    strangers = [one for one in predictions if one not in known]
    if len(missing) == len(ids):
        raise UserError(
            f"{name}: none of its {len(predictions):,} ids ({listing(list(predictions))}) is among the "
            f"{len(ids):,} examples ({listing(missing)}); it was made for other data"
        )
    notes = []
    if missing:
        notes.append(f"{len(missing):,} {kind}s have no prediction and {consequence} ({listing(missing)})")
    if strangers:
        notes.append(f"{len(strangers):,} predictions are for no {kind} of these data ({listing(strangers)})")
    return notes
