"""One HTML file of what is known of a run. It loads nothing, and nothing in it but its own script is run."""

import base64
import contextlib
import datetime
import hashlib
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qa_dist.errors import UserError
from qa_dist.reporting.report.breakdown import Breakdown, Calibration, Comparison, breakdowns, calibration
from qa_dist.reporting.report.charts import HEIGHT, WIDTH, Chart
from qa_dist.reporting.report.panels import calibration_chart, review_curve, training_charts
from qa_dist.reporting.report.payload import as_script, page_data
from qa_dist.reporting.report.reading import Story, read_run
from qa_dist.reporting.untrusted import is_number, without_paths

MARKER = "<!-- made by qa-dist report -->"
"""In the head of every report, by which one is known that may be replaced."""
REPORT = "report.html"


def write_report(run: Path, target: Path | None, compare: Path | None, say: Callable[[str], None]) -> Path:
    """Write the report on the run directory `run`, beside the run `compare` where one is named, as one HTML file.

    It goes to `target`, or to report.html in `run`, and replaces an earlier report there, but no other file. `say` gets
    notes, but not the file's path, which is returned. Raises `UserError` where a directory is not that of a run, or the
    file cannot be written; what is missing or damaged in a run directory is said in the report.
    """
    path = target or run / REPORT
    if run.is_dir():  # what cannot be written is better known before the examples are read
        _require_replaceable(path)
    story = read_run(run, say)
    other = read_run(compare, say) if compare is not None else None
    if other is not None and other.task is not story.task:
        raise UserError(f"{compare}: is a run of another task ({other.task.name}) than {run} ({story.task.name})")
    content = page(story, other).encode("utf-8", "replace")  # UTF-8 has no halves of surrogate pairs
    _require_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: the report cannot be written: {error.strerror or error}; name another file (--output FILE)"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    for note in story.notes:
        say(f"note: {note}")
    for note in other.notes if other else ():
        say(f"note: {compare}: {note}")
    return path


def _require_replaceable(path: Path) -> None:
    """Raise `UserError` unless a report can be written to `path` without a loss."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a file (--output FILE)")
    if not path.exists():
        if not path.parent.is_dir():
            raise UserError(f"{path}: the report cannot be written: there is no directory {path.parent}; make it first")
        return
    if not path.is_file():
        raise UserError(f"{path}: is no file that a report can be written to; name another one (--output FILE)")
    try:
        with path.open("rb") as file:
            head = file.read(1000)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; name another file (--output FILE)") from None
    if MARKER.encode() not in head:
        raise UserError(
            f"{path}: is there already, and is not a report of qa-dist; nothing is overwritten: name another file "
            "(--output FILE), or move that one away"
        )


# ------------------------------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    name: str
    value: float
    """The last one."""
    best: float
    best_at: str
    """Where the best one was, such as epoch 2; empty where it is the last, or the only one."""
    other: float | None
    """The last one of the run that is compared with."""
    higher_is_better: bool
    is_comparable: bool
    """Whether both runs were evaluated on the same examples, so that a difference says something."""


def page(story: Story, other: Story | None = None) -> str:
    """The report as HTML."""
    review = story.review
    comparison, problem = _comparison(story, other)
    figures, reliability = _figures(story, other, comparison)
    training = training_charts(story, other)
    notes = [*story.notes]
    if other:
        notes += [f"{_label(other, story)}: {note}" for note in other.notes]
        notes += comparison.notes if comparison else [problem]
    notes = [without_paths(note) for note in notes]
    data = page_data([*training, *figures], review, comparison)
    script, style = _part("charts.js") + _part("page.js"), _part("page.css")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": _number, "signed": _signed}
    return environment.from_string(_part("page.html.j2")).render(
        marker=Markup(MARKER),
        policy=f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        script=Markup(script),
        style=Markup(style),
        data=as_script(data),
        story=story,
        other=other,
        labels=(_label(story, other), _label(other, story) if other else ""),
        made=f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        version=importlib.metadata.version("qa_dist"),
        facts=_facts(story),
        tiles=tiles(story, other, comparison),
        training=training,
        size=(WIDTH, HEIGHT),
        notes=notes,
        review=review,
        comparison=comparison,
        **_tables(review, comparison),
        figures=figures,
        calibration=reliability,
        summary=_flat(story.summary) if review is None else {},
    )


def _comparison(story: Story, other: Story | None) -> tuple[Comparison | None, str]:
    """Compare the examples of two runs. Returns None, and why, where there is nothing to compare."""
    if other is None or story.review is None or other.review is None:
        return None, "The examples of the two runs cannot be compared."
    found = Comparison.of(story.review, other.review)
    if not found.pairs:
        return None, "No example is in both runs: they were evaluated on different data, and are not compared."
    return found, ""


def _part(name: str) -> str:
    return (files("qa_dist.reporting.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names the one inline script, or style, that is allowed."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _label(story: Story, beside: Story | None) -> str:
    """A name that tells the two runs apart."""
    if beside is None or story.name != beside.name:
        return story.name
    if story.directory != beside.directory:
        return story.directory
    return f"{story.path.absolute().parent.name}/{story.directory}"


def _facts(story: Story) -> dict[str, str]:
    facts = {"Directory": story.directory, "State": story.state, "Model": story.model, "Engine": story.engine}
    facts |= {name.capitalize(): text for name, text in story.data.items()}
    if story.log.train:
        last = story.log.train[max(story.log.train)]
        epoch = last.get("epoch")
        facts["Steps logged"] = f"up to {max(story.log.train):,}" + (f", epoch {epoch:.2f}" if is_number(epoch) else "")
    if is_number(story.metrics.get("train_seconds")):
        facts["Time in training steps"] = f"{story.metrics['train_seconds'] / 60:,.1f} min"
    return {name: text for name, text in facts.items() if text}


def tiles(story: Story, other: Story | None, comparison: Comparison | None = None) -> list[Tile]:
    """Return the task's headline figures: the last ones, and the best, where those were earlier.

    Figures that the task's card does not name are losses: lower is better.
    """
    found = []
    if comparison is not None:
        same = not (comparison.only_here or comparison.only_there or comparison.differing)
    else:  # the examples are not known, or none is in both
        same = (
            other is not None and not (story.review and other.review) and _validated_on(story) == _validated_on(other)
        )
    for name, shown in story.task.headline.items():
        rows = _figures_of(story, name)
        if not rows:
            continue
        higher = name in story.task.card.metrics
        value = rows[-1][1]
        epoch, best = (max if higher else min)(reversed(rows), key=lambda row: row[1])
        at = f"epoch {epoch:g}" if best != value and epoch is not None else ""
        theirs = _figures_of(other, name) if other else []
        found.append(Tile(shown, value, best, at, theirs[-1][1] if theirs else None, higher, same))
    return found


def _validated_on(story: Story) -> dict[str, str]:
    """Return the names of the data that the run was evaluated on."""
    is_held_out = "validation share" in story.data
    return {name: text for name, text in story.data.items() if is_held_out or name != "training data"}


def _figures_of(story: Story, name: str) -> list[tuple[float | None, float]]:
    """Epoch and value of every evaluation; the one of metrics.json where no other is known."""
    rows = [row for row in story.log.evaluation.values() if is_number(row.get(name))] or [story.metrics]
    figures = [(row.get("epoch"), row.get(name)) for row in rows]
    return [
        (epoch if is_number(epoch) else None, value)
        for epoch, value in figures
        if value is not None and is_number(value)
    ]


def _figures(
    story: Story, other: Story | None, comparison: Comparison | None
) -> tuple[list[Chart], tuple[Calibration, Calibration | None] | None]:
    """The charts beside those of training, and the calibration of the run, and of the other one."""
    if story.review is None:
        return [], None
    here = calibration(story.review.examples)
    there = calibration([b for _, b in comparison.pairs]) if comparison else None
    charts = [calibration_chart(here, there)] if here else []
    theirs = {curve.title: curve for curve in (other.review.curves if other and other.review else [])}
    charts += [
        review_curve(f"curve-{i}", curve, theirs.get(curve.title)) for i, curve in enumerate(story.review.curves)
    ]
    return [one for one in charts if one is not None], (here, there) if here else None


def _tables(review: Any, comparison: Comparison | None) -> dict[str, list[Breakdown]]:
    return {"breakdowns": breakdowns(review, comparison) if review else []}


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The figures in nested objects, by their names."""
    found: dict[str, str] = {}
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict) and not prefix:
            found |= _flat(value, f"{name}: ")
        elif is_number(value):
            found[name] = _number(value)
    return found


def _number(value: Any, digits: int = 2) -> str:
    if not is_number(value):
        return "–" if value is None or not isinstance(value, str) else value
    return (f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}").replace("-", "−")


def _signed(value: float, digits: int = 2) -> str:
    """With its sign; the minus is as wide as the plus."""
    rounded = round(value, digits)
    return "±0" if rounded == 0 else f"{rounded:+.{digits}f}".replace("-", "−")
