"""Reading labelled words from files and data sets: columns as in the CoNLL shared tasks, JSON, JSON lines, Parquet."""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qa_dist.errors import UserError, listing
from qa_dist.tasks.reading import Record, content, decoded, json_records, parquet_records, suffix
from qa_dist.tasks.token_classification.scheme import is_label

FORMS = "not a list of examples with tokens and ner_tags"
DOCUMENT_START = "-DOCSTART-"
"""The word of lines that separate documents."""


COMMENT = ("# ", "#\t")
"""What lines before a sentence that are none of its words begin with."""
FIELDS = ("id", "tokens", "ner_tags")


def read_file(path: Path, columns: Mapping[str, str], labelled: bool = True) -> list[Record]:
    """Read columns (a word a line, a blank line between sentences), a JSON list, JSON lines or Parquet; each may be
    compressed with gzip.

    `columns` maps our field names, `FIELDS`, to those of the file; in columns tokens and ner_tags to their numbers,
    counted from 1, where they are others than the first and the last. If not `labelled`, tags are neither needed nor
    looked at. Raises `UserError` for a file that is missing, empty, damaged, or in none of these forms.
    """
    data = content(path)
    if data[:4] == b"PAR1":
        records = list(parquet_records(path, data, columns.get("ner_tags", "ner_tags")))
        return with_our_names(records, columns, str(path), labelled)
    text = decoded(path, data)
    kind = suffix(path)
    if kind in (".json", ".jsonl", ".ndjson") or _is_json(text.strip()):
        return with_our_names(json_records(path, text, FORMS), columns, str(path), labelled)
    if kind == ".csv":
        raise UserError(
            f"{path}: CSV cannot hold a sentence; write JSON lines with tokens and ner_tags, or a word and its tag a "
            "line, between them a blank or a tab, and call the file .conll"
        )
    return _columns(path, text, columns, labelled)


def _is_json(text: str) -> bool:
    """Whether it is a list or an object of JSON, or begins with a line that is one; a word [] or {} is none."""
    for part in (text.split("\n", 1)[0], text) if text[:1] in ("{", "[") else ():
        with contextlib.suppress(ValueError, RecursionError):
            return bool(json.loads(part))
    return False


def _columns(path: Path, text: str, columns: Mapping[str, str], labelled: bool) -> list[Record]:
    """Sentences of a file in columns; `line` of each is where its first word stands. The first has `comments`: which
    lines of the file were taken for that."""
    _require_known(columns, str(path))
    if "id" in columns:
        raise UserError(f"data.columns: id: sentences in columns ({path}) have no ids; leave it out")
    lines = re.split(r"\r\n|\n|\r", text)
    first = next((i for i, line in enumerate(lines) if not _is_apart(line) and not line.startswith(COMMENT)), None)
    if first is None:
        raise UserError(f"{path}: holds no words")
    has_tabs = "\t" in lines[first]

    def cells_of(line: str) -> list[str]:
        return [cell.strip() for cell in line.split("\t")] if has_tabs else re.split(r"[ \t]+", line.strip(" \t"))

    width = len(cells_of(lines[first]))
    if labelled and width == 1:
        raise UserError(f"{path}:{first + 1}: has one column only; the word's tag has to stand in the last one")
    word = _column(path, columns, "tokens", 1, width)
    # without labels the column of tags only helps to tell comments, and may be missing
    has_tags = labelled or columns.get("ner_tags") in [str(place) for place in range(1, width + 1)]
    tag = _column(path, columns if has_tags else {}, "ner_tags", width, width)
    sentences: list[list[tuple[int, list[str]]]] = [[]]
    comments: list[str] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, start=1):
        cells = cells_of(line)
        if _is_apart(line) or cells[word : word + 1] == [DOCUMENT_START]:
            sentences.append([])
            continue
        fits = len(cells) == width
        if not sentences[-1] and line.startswith(COMMENT) and not (fits and is_label(cells[tag])):
            comments.append(f"{path}:{number}")  # such as the sentence's id; a word # has its tag
            continue
        if not fits:
            wrong.append(f"{path}:{number} has {len(cells)}")
        sentences[-1].append((number, cells))
    if wrong:
        by = "tabs" if has_tabs else "blanks"
        raise UserError(
            f"{path}: another number of columns than line {first + 1}, which has {width} (divided by {by}), have "
            f"{len(wrong):,} of its lines: {listing(wrong)}"
        )
    if "tokens" not in columns and width > 1:
        _require_words([cells for sentence in sentences for _, cells in sentence], path, width, tag, labelled)
    records = []
    for sentence in filter(None, sentences):
        line, tokens = sentence[0][0], [cells[word] for _, cells in sentence]
        values: dict[str, Any] = {"tokens": tokens, "line": line, "comments": [] if records else comments}
        if labelled:
            values["ner_tags"] = [cells[tag] for _, cells in sentence]
        records.append(Record(values, f"{path}:{line}"))
    return records


def _is_apart(line: str) -> bool:
    """Whether it stands between sentences."""
    return not line.strip() or line.startswith(DOCUMENT_START)


def _require_words(rows: Sequence[Sequence[str]], path: Path, width: int, tag: int, labelled: bool) -> None:
    """Raise `UserError` for a file whose first column holds the words' numbers, or that may be running text."""
    if rows and all(cells[0].isdecimal() for cells in rows) and width > 1 + labelled:
        raise UserError(
            f"{path}: the first of {width} columns holds nothing but numbers; say where the words and the tags stand "
            "(such as --data.columns '{tokens: 2, ner_tags: 3}')"
        )
    if not labelled and 2 * sum(is_label(cells[tag]) for cells in rows) < len(rows):
        raise UserError(
            f"{path}: its lines have {width} columns, and no tags (IOB2) in the last one. If these are columns, say "
            "where the words stand (--data.columns '{tokens: 1}'); running text is for qa-dist tag"
        )


def _require_known(columns: Mapping[str, str], name: str) -> None:
    """Raise `UserError` for fields that there are not."""
    if strange := [ours for ours in columns if ours not in FIELDS]:
        raise UserError(
            f"data.columns: {listing(strange)}: there are no such fields ({name}); there are {listing(FIELDS)}"
        )


def _column(path: Path, columns: Mapping[str, str], name: str, default: int, width: int) -> int:
    """The column's place, from 0."""
    text = columns.get(name, str(default))
    if not text.isdecimal() or not 1 <= int(text) <= width:
        raise UserError(
            f"data.columns: {name}: {text!r} is no column of {path}: it has {width}; give the number of one, counted "
            "from 1"
        )
    return int(text) - 1


def with_our_names(
    records: Sequence[Record], columns: Mapping[str, str], name: str, labelled: bool = True
) -> list[Record]:
    """The records with `columns` renamed. Raises `UserError` for columns that no record has."""
    _require_known(columns, name)
    if not records:
        raise UserError(f"{name}: holds no examples")
    fields = ["tokens", *(["ner_tags"] if labelled else [])]
    wanted = {ours: columns.get(ours, ours) for ours in (*fields, *(["id"] if "id" in columns else []))}
    present = dict.fromkeys(key for record in records for key in record.values)
    missing = [theirs for theirs in wanted.values() if theirs not in present]
    if missing:
        raise UserError(
            f"{name}: has no column {listing([repr(column) for column in missing])}; it has "
            f"{listing([repr(column) for column in present], limit=20)}. Say which is which with data.columns, such as "
            "{tokens: words, ner_tags: labels}"
        )
    wanted.setdefault("id", "id")
    return [
        Record(
            {ours: record.values[theirs] for ours, theirs in wanted.items() if theirs in record.values}, record.place
        )
        for record in records
    ]
