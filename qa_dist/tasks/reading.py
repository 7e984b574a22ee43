"""Records out of files: JSON, JSON lines, tables and Parquet, each of them compressed or not, whatever the task."""

import csv
import glob
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from qa_dist.errors import UserError, listing


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


def content(path: Path) -> bytes:
    """What the file holds, unpacked. Raises `UserError` where it cannot be read."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: the gzip file is damaged or cut off") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def decoded(path: Path, data: bytes) -> str:
    """The text that `data`, of the file at `path`, are. Raises `UserError` where they are none, or an empty one."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start:,}); convert it to UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def suffix(path: Path) -> str:
    """The file's, in lower case, without that of the compression."""
    return (path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix).lower()


# -------------------------------------------------------------------------------------------------- JSON


Unfold = Callable[[Path, list[Any]], list[Record] | None]
"""Makes records of a JSON list whose items are none yet; None where they are records."""


def json_records(path: Path, text: str, forms: str, unfold: Unfold | None = None) -> list[Record]:
    """A JSON list (bare or under "data"), or JSON lines. `forms` says, for the message, what else it could be.

    Raises `UserError` for what is none of these.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        first_line = text.lstrip().split("\n", 1)[0]
        if _is_json(first_line) and "\n" in text.strip():
            return list(_json_lines(path, text))
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise UserError(f"{path}:{line}: is not valid JSON: {json_error(error)}") from None
    if isinstance(document, dict) and "data" not in document:
        document = [document]  # JSON lines with a single line
    items = document.get("data") if isinstance(document, dict) else document
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{path}: is JSON, but {forms}")
    unfolded = unfold(path, items) if unfold else None
    return [Record(item, f"{path}, example {i + 1}") for i, item in enumerate(items)] if unfolded is None else unfolded


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def json_error(error: Exception) -> str:
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
            raise UserError(f"{path}:{number}: is not valid JSON: {json_error(error)}") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}:{number}: is not an example (a JSON object)")
        yield Record(values, f"{path}, line {number}")


# ------------------------------------------------------------------------------------------------- tables


def table_records(path: Path, text: str) -> Iterator[Record]:
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


def parquet_records(path: Path, data: bytes, named: str = "") -> Iterator[Record]:
    """The rows; in the column `named` lists of numbers become lists of the names that `datasets` has put beside them
    into the file, if it has."""
    try:
        table = pyarrow.parquet.read_table(pa.BufferReader(data))
        rows = table.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: the Parquet file cannot be read: {str(error).splitlines()[0]}") from None
    from datasets import Features

    names = names_of(Features.from_arrow_schema(table.schema).get(named)) if named else ()
    for i, values in enumerate(rows):
        if names and isinstance(values[named], list):
            values[named] = [names[n] if isinstance(n, int) and 0 <= n < len(names) else n for n in values[named]]
        yield Record(values, f"{path}, row {i + 1}")


def names_of(feature: Any) -> tuple[str, ...]:
    """Of the numbers in a column of lists, where `datasets` knows any."""
    return tuple(getattr(getattr(feature, "feature", None), "names", ()))


# ---------------------------------------------------------------------------------------------------- ids


def ids_of(records: Sequence[Record], wrong: Mapping[str, list[str]], notes: list[str]) -> list[str]:
    """The records' ids, or their numbers where none has one. Adds to `wrong` (what -> where) those that lack theirs."""
    if not any("id" in record.values for record in records):
        notes.append(f"no example has an id: numbered 0 to {len(records) - 1:,}")
        return [str(i) for i in range(len(records))]
    ids = []
    for record in records:
        value = record.values.get("id")
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            wrong["there is no id (a text or a whole number)"].append(record.place)
        elif not is_unicode(str(value)):
            wrong["the id holds half of a surrogate pair, which is no character"].append(record.place)
        ids.append(str(value) if value is not None else record.place)
    return ids


def require_different(ids: Sequence[str], records: Sequence[Record], wrong: Mapping[str, list[str]]) -> None:
    """Add to `wrong` what ids are given to more than one of `records`."""
    for one, count in Counter(ids).items():
        if count > 1:
            places = [record.place for record, own in zip(records, ids, strict=True) if own == one]
            wrong["the id is given to more than one example"].append(f"{one!r} by {listing(places, limit=2)}")


def require_none_wrong(name: str, wrong: Mapping[str, list[str]]) -> None:
    """Raise one `UserError` that lists all that is wrong with the examples called `name`."""
    if wrong:
        lines = [f"  - {what}: {len(where):,} ({listing(where)})" for what, where in wrong.items()]
        raise UserError(f"{name} cannot be used:\n" + "\n".join(lines))


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
