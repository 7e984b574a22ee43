"""Files of JSON lines that a model is asked with: a line in, a line out."""

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from qa_dist.errors import UserError

LINES_AT_ONCE = 1024
"""Lines that are answered together, where so many are there to be read."""

NOT_JSON = "is not JSON"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asking:
    """What lines of one kind hold, and who answers them."""

    problem: Callable[[dict[str, Any]], str | None]
    """What is wrong with a line's values; None if nothing is."""
    ask: Callable[[list[dict[str, Any]]], list[dict[str, Any] | UserError]]
    """The fields of the answer to each of several good lines, or why there is none. Raises `UserError` if one of them
    cannot be answered."""
    fields: frozenset[str]
    """Names of a line's fields that are not passed on: what was asked, and what would be taken for the answer's."""
    expected: str
    """What a line is to be."""


@dataclass
class _Line:
    number: int
    """In the file, from 1."""
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def answer_lines(file: BinaryIO, name: str, asking: Asking, show: Say, say: Say) -> int:
    """Answer the lines of `file`, which is called `name` in messages: a line of JSON for each. Returns exit code 2 if
    some could not be answered. Raises `UserError` if there are none."""
    count = failed = not_json = 0
    for lines in _at_hand(_read(file, asking)):
        for line, result in zip(lines, _results(asking, lines), strict=True):
            count += 1
            own = {key: value for key, value in line.values.items() if key not in asking.fields | {"line", "error"}}
            if line.error is not None:
                failed += 1
                not_json += line.error.startswith(NOT_JSON)
                say(f"{name}, line {line.number}: {line.error}")
                result = {"line": line.number, "error": line.error}
            show(json.dumps(own | result, ensure_ascii=False))
    if not count:
        raise UserError(f"--input: {name}: holds no line")
    if failed:
        say(f"{failed:,} of {count:,} lines could not be answered")
    if not_json == count:
        say(f"each line has to be {asking.expected}; other files of data are for qa-dist predict")
    return 2 if failed else 0


def _results(asking: Asking, lines: list[_Line]) -> list[dict[str, Any]]:
    """The answer to each line, empty for one with an error. Errors of single lines are noted in them."""
    good = [line for line in lines if line.error is None]
    answers: list[dict[str, Any] | UserError] = []
    try:
        answers = asking.ask([line.values for line in good]) if good else []
    except UserError:  # one of them cannot be answered: which, is seen one by one
        for line in good:
            try:
                answers += asking.ask([line.values])
            except UserError as error:
                answers.append(error)
    results: dict[int, dict[str, Any]] = {}
    for line, answer in zip(good, answers, strict=True):
        if isinstance(answer, UserError):
            line.error = str(answer)
        else:
            results[id(line)] = answer
    return [results.get(id(line), {}) for line in lines]


def _read(file: BinaryIO, asking: Asking) -> Iterator[_Line]:
    for number, data in enumerate(file, 1):
        line = _Line(number)
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            values = json.loads(text)
            if isinstance(values, dict):
                line.values = values
                line.error = asking.problem(values)
            else:
                line.error = f"is not {asking.expected}"
        except UnicodeDecodeError as error:
            line.error = f"is not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start})"
        except (ValueError, RecursionError) as error:
            line.error = f"{NOT_JSON}: {error}"
        yield line


def _at_hand(lines: Iterable[_Line]) -> Iterator[list[_Line]]:
    """`lines` as they come: those that have been read while others were answered, together. So a file is answered in
    large parts, and a program that waits for each answer before it asks on is not kept waiting."""
    waiting: queue.Queue[_Line | Exception | None] = queue.Queue(LINES_AT_ONCE)

    def read() -> None:
        try:
            for line in lines:
                waiting.put(line)
            waiting.put(None)
        except Exception as error:  # told where the lines are used
            waiting.put(error)

    threading.Thread(target=read, daemon=True).start()
    ended = False
    while not ended:
        batch = [waiting.get()]
        while len(batch) < LINES_AT_ONCE and not waiting.empty():
            batch.append(waiting.get())
        last = batch[-1]
        ended = not isinstance(last, _Line)
        if found := [line for line in batch if isinstance(line, _Line)]:
            yield found  # also what was read before an error
        if isinstance(last, OSError):
            raise UserError(f"--input: cannot be read any further: {last.strerror or last}")
        if isinstance(last, Exception):
            raise last
