"""From a run directory to what a report can tell of it.

The files may be damaged, missing or still being written, and anyone may have written them. What they do not say is
left out, and the report says so.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qa_dist.config import RunConfig
from qa_dist.config_sources import from_yaml, resolve
from qa_dist.errors import UserError, listing
from qa_dist.reporting.run_directory import METRICS
from qa_dist.reporting.status import is_gone
from qa_dist.reporting.untrusted import file_name, hub_id, is_count, is_number, plain, without_paths
from qa_dist.tasks import Task, load_task, task_class
from qa_dist.tasks.task import Review

SUMMARY = "predictions_summary.json"
COMMAND_NAMES = ("train", "evaluate", "predict")
"""Names that earlier versions gave to runs without one, whatever their directory."""


@dataclass
class Log:
    """What metrics.jsonl tells: the figures of every step that was logged, by step, in order."""

    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[int, dict[str, Any]] = field(default_factory=dict)
    damaged: int = 0
    """Lines that could not be read."""

    @classmethod
    def read(cls, path: Path) -> "Log":
        log = cls()
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError:
            return log
        for line in filter(None, (line.strip() for line in lines)):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
                log.damaged += 1
            elif row["kind"] in ("train", "evaluation"):
                if not is_count(row.get("step")):
                    log.damaged += 1
                    continue
                # a step that was done again counts as it was done last
                (log.train if row["kind"] == "train" else log.evaluation)[row["step"]] = row
        log.train, log.evaluation = dict(sorted(log.train.items())), dict(sorted(log.evaluation.items()))
        return log

    def points(self, kind: str, name: str, x: str = "step") -> list[tuple[float, float]]:
        """A figure of "train" or "evaluation" over step or epoch, where both are numbers."""
        rows = (self.train if kind == "train" else self.evaluation).values()
        return [(row[x], row[name]) for row in rows if is_number(row.get(x)) and is_number(row.get(name))]


@dataclass
class Story:
    """A run, as far as its directory tells."""

    path: Path
    config: RunConfig | None
    task: type[Task]
    status: dict[str, Any]
    metrics: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    log: Log
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged, and other remarks."""
    review: Review | None = None

    @property
    def name(self) -> str:
        """The name that the run was given, or else its directory's."""
        own = self.config.run.name if self.config else None
        return (plain(own or "") if own not in COMMAND_NAMES else "") or self.directory

    @property
    def directory(self) -> str:
        return plain(self.path.absolute().name) or "run"

    @property
    def state(self) -> str:
        """How the run ended, in a few words."""
        state, reason = self.status.get("state"), plain(without_paths(str(self.status.get("reason") or "")))
        at = f" at step {self.status['step']:,}" if is_count(self.status.get("step")) and self.status["step"] else ""
        if state == "running" and is_gone(self.status):
            return f"interrupted{at}: its process is gone, and has not said why"
        if state == "running":
            return f"still running{at}; the figures are those so far"
        if state not in ("completed", "stopped", "failed"):
            return "not known (status.json does not tell)"
        return f"{state}{at}{f': {reason}' if reason else ''}"

    @property
    def model(self) -> str:
        settings = self.config.model if self.config else None
        if settings is None:
            return "not known"
        if settings.name is None:
            return plain(f"trained from scratch ({(settings.config or {}).get('model_type', 'no type')})")
        return hub_id(settings.name) or file_name(settings.name)

    @property
    def engine(self) -> str:
        launch = self.environment.get("launch") or self.status.get("launch")
        return plain(launch) if isinstance(launch, str) else ""

    @property
    def data(self) -> dict[str, str]:
        """Split -> names of its files, without their directories."""
        data = self.config.data if self.config else None
        if data is None:
            return {}
        if data.synthetic is not None:
            return {"data": f"synthetic, seed {data.synthetic.seed}"}
        if data.dataset is not None:
            name = hub_id(data.dataset) or file_name(data.dataset)
            return {"data": plain(f"{name} ({data.train_split}, {data.validation_split})")}
        found = {"training data": data.train_file, "validation data": data.validation_file}
        names = {split: listing([file_name(file) for file in files], 3) for split, files in found.items() if files}
        return names | ({"validation share": str(data.validation_share)} if data.validation_share else {})


def read_run(path: Path, say: Callable[[str], None]) -> Story:
    """All that the directory at `path` tells. Raises `UserError` where it is not that of a run."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such directory"
        raise UserError(f"{path}: {what}; name a run directory")
    if not (path / "config.yaml").is_file():
        hint = f"; did you mean {path.parent}?" if (path.parent / "config.yaml").is_file() else "; name a run directory"
        raise UserError(f"{path}: is not a run directory (there is no config.yaml){hint}")
    notes: list[str] = []
    config, task = _config(path, notes)
    status, metrics, environment, summary = (
        _object(path / name, notes) for name in ("status.json", "metrics.json", "environment.json", SUMMARY)
    )
    log = Log.read(path / METRICS)
    if log.damaged:
        lines = "line is" if log.damaged == 1 else "lines are"
        notes.append(f"{METRICS}: {log.damaged:,} {lines} damaged or half-written, and left out")
    history = metrics.get("history")
    if not log.evaluation and isinstance(history, list):
        log.evaluation = {row["step"]: row for row in history if isinstance(row, dict) and is_count(row.get("step"))}
    story = Story(path, config, task, status, metrics, environment, summary, log, notes)
    if status.get("state") == "completed" and not (metrics or log.train or log.evaluation):
        notes.append("Here are predictions alone (qa-dist predict): they were not compared with what is right.")
        return story
    if not log.train:
        notes.append("No training steps were logged here, so there are no curves of training.")
    if config is not None:
        story.review = _review(story, config, say)
    if story.review is not None:
        notes += _contradictions(story.review, metrics)
    return story


def _contradictions(review: Review, metrics: Mapping[str, Any]) -> list[str]:
    """Where metrics.json is not of the predictions that lie beside it."""
    means = {name: sum(one.figures[name] for one in review.examples) / len(review.examples) for name in review.figures}
    return [
        f"metrics.json says {review.figures[name]} {metrics[name]:.2f}, the predictions give {mean:.2f}: they are "
        "not of the same evaluation, or not of the same data."
        for name, mean in means.items()
        if is_number(metrics.get(name)) and abs(metrics[name] - mean) > 0.005
    ]


def _config(path: Path, notes: list[str]) -> tuple[RunConfig | None, type[Task]]:
    """The run's settings, None where they cannot be read, and its task. Raises `UserError` for an unknown task."""
    source = from_yaml(path / "config.yaml")
    name = source.values.get("task", RunConfig().task)
    try:
        task = task_class(name if isinstance(name, str) else repr(name))
    except UserError as error:
        raise UserError(f"{path / 'config.yaml'}: {error}") from None
    try:
        if source.problems or not {"data", "model", "run"} <= source.values.keys():
            raise UserError("\n".join(problem.message for problem in source.problems) or "settings are missing")
        return resolve([source]), task
    except (UserError, RecursionError) as error:
        first = plain(str(error).strip().split("\n")[-1].removeprefix("  - "))
        notes.append(f"config.yaml cannot be used ({first}), so the examples are not shown")
        return None, task


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    """The JSON object in a file; empty, with a note, where it holds something else, and without one where there is
    none."""
    content = _json(path, notes)
    if content is not None and not isinstance(content, dict):
        notes.append(f"{path.name} does not hold a JSON object, and is left out")
    return content if isinstance(content, dict) else {}


def _json(path: Path, notes: list[str]) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror}), and is left out")
    except (ValueError, RecursionError):
        notes.append(f"{path.name} is damaged or half-written, and is left out")
    return None


def _review(story: Story, config: RunConfig, say: Callable[[str], None]) -> Review | None:
    """The evaluation, example by example; None, with a note, where what it needs is not there."""
    files: Mapping[str, Any] = {
        name: content
        for name in story.task.evaluation_files
        if (content := _json(story.path / name, story.notes)) is not None
    }
    if not files:
        story.notes.append("No predictions are stored here, so there are no examples to show.")
        return None
    model = story.path / "model"
    # The directory may come from anyone: code that lies in it is not run, whatever its own settings say.
    changes: dict[str, Any] = {"trust_remote_code": False}
    if (model / "config.json").is_file():
        changes |= {"name": str(model), "config": None, "tokenizer": None}
    settings = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    say(f"{story.path}: reading the validation examples")
    hint = " Relative paths in config.yaml count from where the run was started: make the report there."
    try:
        task = load_task(settings)
        features = task.features("validation")
        hint = ""
        if features is None:
            raise UserError("config.yaml names no validation data")
        review = task.review(files, features)
    except UserError as error:
        story.notes.append(f"The examples cannot be shown: {error}.{hint}")
        return None
    except Exception as error:  # whatever the readers of tokenizers and data sets raise
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        story.notes.append(f"The examples cannot be shown: {type(error).__name__}: {first}")
        return None
    story.notes += [f"Validation data: {note}" for note in features.notes] + review.notes
    return review
