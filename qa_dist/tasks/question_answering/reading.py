"""Reading question-answering records from files and data sets, in every form people keep them in."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qa_dist.errors import UserError, listing
from qa_dist.tasks.reading import (
    Record,
    content,
    decoded,
    json_records,
    parquet_records,
    suffix,
    table_records,
)
from qa_dist.tasks.reading import expand as expand

QUESTION_FIELDS = ("id", "question", "context")
"""Of an example, without what is known of its answers."""
FORMS = "neither SQuAD's form (data > paragraphs > qas) nor a list of examples with id, question, context and answers"


def read_file(path: Path, columns: Mapping[str, str], labelled: bool = True) -> list[Record]:
    """Read SQuAD's nested JSON, a flat JSON list (bare or under "data"), JSON lines, CSV, TSV or Parquet; each may
    be compressed with gzip.

    `columns` maps our field names to those of the file, where they differ. If not `labelled`, answers are neither
    needed nor looked at. Raises `UserError` for a file that is missing, empty, damaged, or in none of these forms.
    """
    data = content(path)
    if data[:4] == b"PAR1":
        records = list(parquet_records(path, data))
    else:
        text = decoded(path, data)
        if suffix(path) in (".conll", ".bio", ".iob", ".iob2"):
            raise UserError(f"{path}: words and their tags in columns are for --task token_classification")
        is_table = suffix(path) in (".csv", ".tsv")
        records = list(table_records(path, text)) if is_table else json_records(path, text, FORMS, _unfolded)
    if not records:
        raise UserError(f"{path}: holds no examples")
    return with_our_names(records, columns, str(path), labelled)


# -------------------------------------------------------------------------------------------------- JSON


def _unfolded(path: Path, items: list[Any]) -> list[Record] | None:
    return list(_nested(path, items)) if any("paragraphs" in item for item in items) else None


def _nested(path: Path, articles: list[Any]) -> Iterator[Record]:
    for i, article in enumerate(articles):
        for j, paragraph in enumerate(_list(article, "paragraphs", f"{path}, data[{i}]")):
            place = f"{path}, data[{i}].paragraphs[{j}]"
            for k, question in enumerate(_list(paragraph, "qas", place)):
                if not isinstance(question, dict):
                    raise UserError(f"{place}.qas[{k}]: is not an object")
                yield Record({"context": paragraph.get("context"), **question}, f"{place}.qas[{k}]")


def _list(parent: Any, key: str, place: str) -> list[Any]:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, list):
        raise UserError(f"{place}: has no list {key!r}")
    return value


# --------------------------------------------------------------------------------------------- field names


def with_our_names(
    records: Sequence[Record], columns: Mapping[str, str], name: str, labelled: bool = True
) -> list[Record]:
    """The records with `columns` renamed, and with answers that a table keeps as text, or as two columns, put into
    the form that JSON has; if not `labelled`, without any answers. Raises `UserError` for columns that no record has.
    """
    present = dict.fromkeys(key for record in records for key in record.values)
    wanted = {key: columns.get(key, key) for key in ("question", "context")}
    if not labelled:
        columns = {ours: columns[ours] for ours in QUESTION_FIELDS if ours in columns}
    elif not any(columns.get(key, key) in present for key in ("answers", "answer_text", "is_impossible")):
        wanted["answers"] = columns.get("answers", "answers")
    elif "answers" not in columns and columns.get("answer_text", "answer_text") in present:
        wanted["answer_start"] = columns.get("answer_start", "answer_start")
    missing = [theirs for theirs in (wanted | dict(columns)).values() if theirs not in present]
    if missing:
        raise UserError(
            f"{name}: has no column {listing([repr(column) for column in dict.fromkeys(missing)])}; it has "
            f"{listing([repr(column) for column in present], limit=20)}. Say which is which with data.columns, such as "
            "{context: passage}"
        )
    if not labelled:
        return [Record(_asked(record.values, columns), record.place) for record in records]
    return [Record(_renamed(record.values, columns), record.place) for record in records]


def _asked(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    names = {ours: columns.get(ours, ours) for ours in QUESTION_FIELDS}
    return {ours: values[theirs] for ours, theirs in names.items() if theirs in values} | {"answers": []}


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    if columns:
        values = {**values, **{ours: values.get(theirs) for ours, theirs in columns.items()}}
    if isinstance(values.get("answers"), str):
        text = values["answers"].strip()
        # what is no JSON stays a text, which the check of the example refuses with its place
        with contextlib.suppress(ValueError, RecursionError):
            values = {**values, "answers": json.loads(text) if text else []}
    elif "answers" not in values and "answer_text" in values:
        texts, starts = values["answer_text"], values.get("answer_start")
        if not isinstance(texts, list):
            texts, starts = ([], []) if texts in (None, "") else ([texts], [starts])
        if isinstance(starts, list):
            starts = [_whole_number(start) for start in starts]
        values = {**values, "answers": {"text": texts, "answer_start": starts}}
    if isinstance(values.get("is_impossible"), str):
        text = values["is_impossible"]
        values = {**values, "is_impossible": _TRUTH.get(text.strip().lower(), text)}
    return values


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}


def _whole_number(value: Any) -> Any:
    """A table's cell as a number, where it is one: CSV has only texts, and Parquet made from CSV often floats."""
    try:
        return int(value) if isinstance(value, str) or (isinstance(value, float) and value == int(value)) else value
    except (ValueError, OverflowError):
        return value
