"""Question-answering examples, checked before anything depends on them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qa_dist.config import DataConfig
from qa_dist.errors import UserError, listing
from qa_dist.tasks.reading import Record, ids_of, is_unicode, require_different, require_none_wrong
from qa_dist.tasks.splits import Examples


@dataclass(frozen=True, slots=True)
class Example:
    """A question, the text that may answer it, and the accepted answers."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    """Accepted answer texts; empty when the context does not answer the question."""
    answer_starts: tuple[int, ...]
    """Character offset in the context of each answer; -1 where it does not stand there."""


def check_records(records: Sequence[Record], config: DataConfig, name: str, training: bool) -> Examples:
    """Turn records into examples, or raise one `UserError` that lists all that is wrong with them.

    Where `config` says so, misaligned answers are dropped or moved, and unanswerable questions dropped; what
    was done is counted in the notes. In validation data an answer's text counts for the score even when its
    offset is wrong; only the training label needs the offset.
    """
    wrong: dict[str, list[str]] = defaultdict(list)
    notes: list[str] = []
    ids = ids_of(records, wrong, notes)
    examples = []
    for record, example_id in zip(records, ids, strict=True):
        example = _example(record, example_id, wrong)
        if example is not None:
            examples.append(example)
    require_different(ids, records, wrong)
    examples = _align(examples, config, training, wrong, notes)
    examples = _without_unanswerable(examples, config, wrong, notes)
    require_none_wrong(name, wrong)
    if not examples:
        raise UserError(f"{name}: no example is left" + "".join(f"; {note}" for note in notes))
    return Examples(examples, notes)


def _example(record: Record, example_id: str, wrong: dict[str, list[str]]) -> Example | None:
    values, where = record.values, f"{example_id!r} in {record.place}"
    good = True
    for key in ("question", "context"):
        text = values.get(key)
        if not isinstance(text, str) or not text.strip():
            wrong[f"the {key} is missing, empty or not a text"].append(where)
            good = False
        elif not is_unicode(text):
            wrong[f"the {key} holds half of a surrogate pair, which is no character"].append(where)
            good = False
    answers: list[tuple[str, int]] = []
    try:
        answers = _answers(values)
    except ValueError as error:
        wrong[str(error)].append(where)
        good = False
    if not good:
        return None
    texts, starts = tuple(text for text, _ in answers), tuple(start for _, start in answers)
    return Example(example_id, values["question"], values["context"], texts, starts)


def _answers(values: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(text, start) pairs from a list of {text, answer_start} or from {text: [...], answer_start: [...]}."""
    impossible = values.get("is_impossible") or False
    if not isinstance(impossible, bool):
        raise ValueError("is_impossible is neither true nor false")
    if "answers" not in values and not impossible:
        raise ValueError("there is no field answers")
    answers = values.get("answers")
    if answers is None:
        answers = []
    if not isinstance(answers, list | dict):
        raise ValueError("answers is neither a list nor an object")
    if isinstance(answers, dict):
        texts, starts = answers.get("text", []), answers.get("answer_start", [])
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError("answers.text and answers.answer_start are not lists of the same length")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    pairs = []
    for answer in answers:
        text = answer.get("text") if isinstance(answer, dict) else None
        start = answer.get("answer_start") if isinstance(answer, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError("an answer has no text")
        if isinstance(start, bool) or not isinstance(start, int):
            raise ValueError("an answer has no answer_start (a whole number)")
        pairs.append((text, start))
    if impossible and pairs:
        raise ValueError("is_impossible is true, but there are answers")
    return pairs


def _align(
    examples: list[Example],
    config: DataConfig,
    training: bool,
    wrong: dict[str, list[str]],
    notes: list[str],
) -> list[Example]:
    """Make sure that every answer start points at its text, as `data.on_misaligned` says."""
    result, misaligned, moved, dropped = [], [], 0, 0
    for example in examples:
        starts = tuple(
            start if start >= 0 and example.context.startswith(text, start) else -1
            for text, start in zip(example.answers, example.answer_starts, strict=True)
        )
        if starts != example.answer_starts:
            misaligned.append(_mismatch(example, starts))
            if config.on_misaligned == "repair":
                starts = tuple(
                    start if start >= 0 else _nearest(example.context, text, given)
                    for text, start, given in zip(example.answers, starts, example.answer_starts, strict=True)
                )
                moved += min(starts) >= 0
            if training and max(starts) < 0:
                dropped += 1
                continue
            example = replace(example, answer_starts=starts)
        result.append(example)
    if misaligned and config.on_misaligned == "error":
        what = (
            "an answer_start does not point at its text (--data.on_misaligned repair moves it to the nearest "
            "place where the text stands, drop leaves it out)"
        )
        wrong[what] += misaligned
        return result
    if misaligned:
        ids = f"{len(misaligned):,} examples with misaligned answers ({listing(misaligned)})"
        notes.append(f"{ids}: {moved:,} repaired, {dropped:,} left out")
    return result


def _mismatch(example: Example, starts: tuple[int, ...]) -> str:
    """What stands where the first answer in `starts` that is marked -1 should stand."""
    place = starts.index(-1)
    start, text = max(example.answer_starts[place], 0), example.answers[place]
    return f"{example.id!r}: at {start} stands {example.context[start : start + len(text)]!r}, not {text!r}"


def _nearest(context: str, text: str, start: int) -> int:
    """The place nearest to `start` where `text` stands in `context`, or -1."""
    places = []
    place = context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    return min(places, key=lambda p: abs(p - start), default=-1)


def _without_unanswerable(
    examples: list[Example], config: DataConfig, wrong: dict[str, list[str]], notes: list[str]
) -> list[Example]:
    ids = [repr(example.id) for example in examples if not example.answers]
    if not ids or config.unanswerable == "allow":
        return examples
    if config.unanswerable == "error":
        what = (
            "the question has no answer (--data.unanswerable allow learns to predict that, as in SQuAD 2.0; "
            "drop leaves such questions out)"
        )
        wrong[what] += ids
        return examples
    notes.append(f"{len(ids):,} questions without an answer left out")
    return [example for example in examples if example.answers]
