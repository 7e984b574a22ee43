"""Reading question-answering records from files and data sets, in every form people keep them in."""

import contextlib
import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from qa_dist.errors import UserError, listing

QUESTION_FIELDS = ("id", "question", "context")
"""Of an example, without what is known of its answers."""


class Record(NamedTuple):
    """One example as it stands in a file, under our names for its fields."""

    values: Mapping[str, Any]
    place: str
    """Where it stands, for messages."""


def expand(patterns: Sequence[str], key: str) -> list[Path]:
    """The files that `patterns` (paths and globs) name, each once, in order. Raises `UserError` for one that names
    none; `key` is the setting they come from."""
    paths: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 -- absolute patterns
        if not found:
            what = "no file matches" if glob.has_magic(pattern) else "there is no such file"
            raise UserError(f"{key}: {pattern}: {what}")
        for file in found:
            if not file.is_file():
                raise UserError(f"{key}: {file} is a directory; name the files in it, such as '{file}/*.json'")
            paths[file] = None
    return list(paths)


def read_file(path: Path, columns: Mapping[str, str], labelled: bool = True) -> list[Record]:
    """Read SQuAD's nested JSON, a flat JSON list (bare or under "data"), JSON lines, CSV, TSV or Parquet; each may
    be compressed with gzip.

    `columns` maps our field names to those of the file, where they differ. If not `labelled`, answers are neither
    needed nor looked at. Raises `UserError` for a file that is
    missing, empty, damaged, or in none of these forms.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: the gzip file is damaged or cut off") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if data[:4] == b"PAR1":
        records = list(_parquet(path, data))
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text (byte {error.start:,}); convert it to UTF-8") from None
        if not text.strip():
            raise UserError(f"{path}: the file is empty")
        kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        records = list(_table(path, text)) if kind.lower() in (".csv", ".tsv") else _json(path, text)
    if not records:
        raise UserError(f"{path}: holds no examples")
    return with_our_names(records, columns, str(path), labelled)


# -------------------------------------------------------------------------------------------------- JSON


def _json(path: Path, text: str) -> list[Record]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        first_line = text.lstrip().split("\n", 1)[0]
        if _is_json(first_line) and "\n" in text.strip():
            return list(_json_lines(path, text))
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise UserError(f"{path}:{line}: is not valid JSON: {_json_error(error)}") from None
    if isinstance(document, dict) and "data" not in document:
        document = [document]  # JSON lines with a single line
    items = document.get("data") if isinstance(document, dict) else document
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(
            f"{path}: is JSON, but neither SQuAD's form (data > paragraphs > qas) nor a list of examples with "
            "id, question, context and answers"
        )
    if any("paragraphs" in item for item in items):
        return list(_nested(path, items))
    return [Record(item, f"{path}, example {i + 1}") for i, item in enumerate(items)]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_error(error: Exception) -> str:
    """Python's parser has limits of its own: on the digits of a number, and on depth."""
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    # split("\n"), not splitlines(): JSON may hold U+2028 and its like inside a line
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: is not valid JSON: {_json_error(error)}") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}:{number}: is not an example (a JSON object)")
        yield Record(values, f"{path}, line {number}")


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


# ------------------------------------------------------------------------------------------------- tables


def _table(path: Path, text: str) -> Iterator[Record]:
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    csv.field_size_limit(2**31 - 1)  # contexts are longer than the 128 kB that csv allows by default
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for values in reader:
            if None in values or None in values.values():
                found = len(reader.fieldnames or ()) + (len(values[None]) if None in values else 0)  # pyright: ignore[reportArgumentType]
                found -= sum(value is None for value in values.values())
                raise UserError(
                    f"{path}:{reader.line_num}: has {found} cells, but the header names {len(reader.fieldnames or ())} "
                    "columns; put texts that hold the delimiter or a line break into double quotes"
                )
            yield Record(values, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: is not a valid table: {error}") from None


def _parquet(path: Path, data: bytes) -> Iterator[Record]:
    try:
        rows = pyarrow.parquet.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: the Parquet file cannot be read: {str(error).splitlines()[0]}") from None
    for i, values in enumerate(rows):
        yield Record(values, f"{path}, row {i + 1}")


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


def read_mapping(path: Path, kind: type[str] | type[float]) -> dict[str, Any]:
    """A JSON file of id -> text or id -> number. Raises `UserError` for one that is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start:,})") from None
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise UserError(f"{path}:{line}: is not valid JSON: {_json_error(error)}") from None
    name, accepted = ("text", str) if kind is str else ("number", (int, float))
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: has to be a JSON object that gives a {name} for every question's id")
    wrong = [key for key, value in content.items() if not isinstance(value, accepted) or isinstance(value, bool)]
    if wrong:
        raise UserError(f"{path}: {len(wrong):,} ids have something else than a {name} ({listing(wrong)})")
    return content
