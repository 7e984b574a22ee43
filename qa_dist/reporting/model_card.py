"""The model card: the README.md of a model's repository on the Hugging Face Hub, and its plot.

Both are pure functions of a run directory's files, so that a push done later from the directory alone gives the same
card. The files may be damaged, absent or still being written: what they do not say is left out. What they do say is
untrusted text, and goes into the card escaped; of paths, which are private, only the last part does.
"""

import contextlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import validate_repo_id
from pydantic.fields import FieldInfo

from qa_dist.config import OWN_SETTINGS, DataConfig, RunConfig
from qa_dist.config_sources import from_yaml, leaves, resolve
from qa_dist.errors import UserError, listing
from qa_dist.reporting.untrusted import file_name, hub_id, is_count, is_number, plain
from qa_dist.tasks import TASKS, Task, task_class

CURVES = "curves.png"
"""Name of the plot in the repository."""

ALWAYS_SHOWN = re.compile(
    r"train\.(epochs|global_batch_size|learning_rate|schedule|warmup_ratio|weight_decay|seed)|data\.(max_length|stride)"
)
SHOWN_IF_CHANGED = re.compile(
    r"train\.\w+|data\.(validation_share|max_\w+_samples)|model\.attention|run\.(export|export_dtype)"
)
"""Settings that the card tells, the latter where they are not the default, as it does those of the task's own. None
that can hold a text of the user's."""
MOST_POINTS = 1000
"""Of a curve; of more steps, means are drawn."""

USAGE = """With qa_dist, to evaluate it on other data, and to go on with its training:

```bash
qa-dist evaluate --model {repo_id} --data.validation_file FILE --run.output_dir OUT
accelerate launch --config_file LAUNCH.yaml -m qa_dist train --config RUN.yaml --resume hub:{repo_id}
```"""


def model_card(run: Path, repo_id: str, *, license: str | None = None) -> str:
    """The text of README.md, metadata included, for the model that the run in `run` has left.

    `license` is the Hub's name of the model's license, such as apache-2.0; None where it is not known. Raises
    `HFValidationError` (a `ValueError`) if `repo_id` cannot be the name of a repository.
    """
    validate_repo_id(repo_id)
    read = _Run.read(run)
    sections = [
        f"---\n{_metadata(read, repo_id, license).to_yaml()}\n---",
        f"# {_escaped(repo_id.split('/')[-1])}",
        f"{read.task.card.summary} {_origin(read.config)} with qa_dist.",
        *_results(read),
        "## Use",
        *([read.task.usage(repo_id, read.config)] if read.config else []),
        USAGE.format(repo_id=repo_id),
        *_training(read),
        *(_data(read.config.data) if read.config else []),
        "## Limits",
        read.task.card.limits,
    ]
    return "\n\n".join(sections) + "\n"


def base_model(run: Path) -> str | None:
    """The Hub's id of the model that the training in `run` started from; None where it was not one of the Hub's."""
    return hub_id(config.model.name) if (config := _config(run)) else None


# ---------------------------------------------------------------------------------------- the run directory


@dataclass(frozen=True)
class _Run:
    """What can be read of a run directory."""

    config: RunConfig | None
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    """One row per epoch, in order; `epoch` and `step` are whole numbers."""
    losses: list[tuple[int, float]]
    """Step and training loss of every logged step, in order."""
    environment: dict[str, Any]
    """environment.json; the launch line, if it is not there, is that of status.json."""
    task: type[Task]
    """That of config.yaml, or else the one that was stored with the model."""

    @classmethod
    def read(cls, run: Path) -> "_Run":
        metrics, status, environment = (
            next(iter(_objects(run / f"{name}.json")), {}) for name in ("metrics", "status", "environment")
        )
        lines = [row for row in _objects(run / "metrics.jsonl") if is_count(row.get("step"))]
        rows: Any = metrics.get("history")
        rows = rows if isinstance(rows, list) else [row for row in lines if row.get("kind") == "evaluation"]
        rows = [row for row in rows if isinstance(row, dict) and is_count(row.get("epoch"), row.get("step"))]
        rows.sort(key=lambda row: (row["epoch"], row["step"]))
        # a step that was done again counts as it was done last
        losses = {row["step"]: row.get("loss") for row in lines if row.get("kind") == "train"}
        drawn: Any = sorted((step, loss) for step, loss in losses.items() if is_number(loss))
        config = _config(run)
        return cls(config, metrics, rows, drawn, {"launch": status.get("launch")} | environment, _task(run, config))

    @property
    def exported(self) -> dict[str, Any]:
        """The row of the epoch whose weights are in model/."""
        return next((row for row in self.history if row["epoch"] == self.metrics.get("epoch")), {})

    def points(self, x: str, name: str) -> list[tuple[int, float]]:
        """A figure of every epoch, over `x`, which is step or epoch."""
        return [(row[x], row[name]) for row in self.history if is_number(row.get(name))]

    @property
    def panels(self) -> list[Callable[[Any, "_Run"], None]]:
        """What the plot is made of."""
        scores = [name for name in self.task.card.metrics if self.points("epoch", name)]
        losses = self.losses or self.points("step", "loss")
        return ([_draw_losses] if losses else []) + ([_draw_scores] if scores else [])


def _task(run: Path, config: RunConfig | None) -> type[Task]:
    stored: Any = next(iter(_objects(run / "model/qa_dist.json")), {}).get("settings")
    name = config.task if config else stored.get("task") if isinstance(stored, dict) else None
    return task_class(name if name in TASKS else RunConfig().task)


def _config(run: Path) -> RunConfig | None:
    source = from_yaml(run / "config.yaml")
    # The file holds every setting, in order: what is missing has been lost, and is not the default.
    if not {"data", "model", "train", "evaluation", "run"} <= source.values.keys():
        return None
    try:
        return resolve([source])
    except (UserError, RecursionError):
        return None


def _objects(path: Path) -> list[dict[str, Any]]:
    """The object in a JSON file, or those in the lines of a .jsonl one, of which the last may be half written."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    found = []
    for text in content.split(b"\n") if path.suffix == ".jsonl" else [content]:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(text))
    return [one for one in found if isinstance(one, dict)]


def _escaped(value: Any) -> str:
    """`value` for Markdown: the middle of a line, or a cell of a table."""
    text = re.sub(r"([\\`*_\[\]<>&~$@])", r"\\\1", plain(value))
    return text.replace("|", "&#124;")  # in tables, not every renderer knows a backslash before it


def _named(name: str, kind: str = "") -> str:
    """A link to what lies on the Hub, or the last part of a path; `kind` is datasets/ or, for models, empty."""
    found = hub_id(name)
    return f"[{_escaped(found)}](https://huggingface.co/{kind}{found})" if found else _escaped(file_name(name))


def _shown(value: Any) -> str:
    return "–" if not is_number(value) else str(value) if isinstance(value, int) else f"{value:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _metadata(read: _Run, repo_id: str, license: str | None) -> ModelCardData:
    config, results = read.config or RunConfig(), _eval_results(read)
    base, dataset = hub_id(config.model.name), hub_id(config.data.dataset)
    return ModelCardData(
        base_model=base if base != repo_id else None,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
        library_name="transformers",
        license=plain(license or "") or "unknown",
        metrics=[result.metric_type for result in results] or None,
        model_name=repo_id.split("/")[-1] if results else None,
        pipeline_tag=read.task.card.pipeline_tag,
        tags=["qa_dist", *read.task.card.tags],
    )


def _eval_results(read: _Run) -> list[EvalResult]:
    """The headline figures of the weights in model/, as the Hub lists them; not those of unknown data."""
    if read.config is None:
        return []
    data: dict[str, Any] = _validation_data(read.config.data)
    names, card = read.task.headline, read.task.card
    return [
        EvalResult(card.pipeline_tag, metric_type=metric_type, metric_value=value, metric_name=names[name], **data)
        for name, metric_type in card.metrics.items()
        if is_number(value := read.metrics.get(name))
    ]


def _validation_data(data: DataConfig) -> dict[str, str]:
    """What a model was evaluated on, in the words of `EvalResult`."""
    slug, name, split, subset = "synthetic", "synthetic", "validation", {}
    if data.dataset is not None:
        name = hub_id(data.dataset) or file_name(data.dataset)
        slug = hub_id(data.dataset) or _slug(name)
        split = plain((data.train_split if data.validation_share else data.validation_split) or "") or split
        subset = {"dataset_config": found} if (found := plain(data.dataset_config or "")) else {}
    elif data.synthetic is None:
        names = [file_name(file) for file in (data.train_file if data.validation_share else data.validation_file)]
        name = listing(names, 3) or "unnamed"
        slug = _slug(names[0] if names else "")
    return {"dataset_type": slug, "dataset_name": name, "dataset_split": split, **subset}


def _slug(name: str) -> str:
    """Made of `name` as the Hub wants the ids of data sets."""
    stem = re.sub(r"(\.(json|jsonl|csv|tsv|parquet|gz))+$", "", name.lower())
    slug = re.sub(r"[^a-z0-9_.]+", "-", stem).strip("-.")
    return slug if slug[:1].isalpha() else f"data-{slug}".strip("-")  # else YAML could take it for a number


# ------------------------------------------------------------------------------------------------------ body


def _origin(config: RunConfig | None) -> str:
    if config is None:
        return "Trained"
    if config.model.name is not None:
        return f"Fine-tuned from {_named(config.model.name)}"
    return f"Trained from scratch ({_escaped((config.model.config or {}).get('model_type'))})"


def _results(read: _Run) -> list[str]:
    """Headline figures, what else the evaluation found, every epoch, and the plot."""
    headline, card, metrics = read.task.headline, read.task.card, read.metrics
    own = ("epoch", "history", "train_seconds")
    figures = {name: _shown(value) for name, value in metrics.items() if name not in own and is_number(value)}
    sections = []
    if found := [name for name in headline if name in figures]:
        data = _validation_data(read.config.data) if read.config else {}
        on = f"On {_escaped(data['dataset_name'])} ({_escaped(data['dataset_split'])}), " if data else ""
        row, names = [figures[name] for name in found], " and ".join(headline[name] for name in card.metrics)
        sections += [f"{on}{names} in {card.unit}:", _table([headline[name] for name in found], [row])]
    if others := [(_escaped(name), text) for name, text in figures.items() if name not in headline]:
        sections += ["All other figures, under their official names:", _table(("figure", "value"), others)]
    if read.history:
        columns = ["epoch", "step", "train_loss", *(name for name in headline if read.points("step", name))]
        rows = [[_shown(row.get(name)) for name in columns] for row in read.history]
        if read.exported:
            rows[read.history.index(read.exported)][0] = f"**{read.exported['epoch']}**"
        title = f"Every epoch{'; in bold, that of this model' if read.exported else ''}:"
        sections += [title, _table([headline.get(name, name.replace("_", " ")) for name in columns], rows)]
    if read.panels:
        sections.append(f"![The losses over the steps, and the figures of every epoch]({CURVES})")
    return ["## Results", *sections] if sections else []


def _training(read: _Run) -> list[str]:
    """Settings, and what they were run on."""
    launch, hardware, software = (read.environment.get(name) for name in ("launch", "hardware", "software"))
    hardware = hardware if isinstance(hardware, list) else []
    software = software.items() if isinstance(software, dict) else []
    seconds = read.metrics["train_seconds"] if is_number(read.metrics.get("train_seconds")) else None
    items = {
        "Weights": ", ".join(f"{key} {read.exported[key]}" for key in ("epoch", "step") if read.exported),
        "Launch": _escaped(launch) if isinstance(launch, str) else "",
        "Hardware": "; ".join(_escaped(line) for line in hardware if isinstance(line, str)),
        "Software": ", ".join(f"{_escaped(name)} {_escaped(text)}" for name, text in software if isinstance(text, str)),
        "Time in training steps": f"{seconds / 60:.1f} min" if seconds else "",
    }
    parts = ["\n".join(f"- {name}: {text}" for name, text in items.items() if text)]
    parts += [_table(("setting", "value"), _settings(read.config))] if read.config else []
    sections = [part for part in parts if part]
    return ["## Training", *sections] if sections else []


def _settings(config: RunConfig) -> list[tuple[str, str]]:
    rows = []
    for key, field in leaves():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name, None)
        may_be_shown = SHOWN_IF_CHANGED.fullmatch(key) or (
            key in OWN_SETTINGS.get(config.task, ()) and _holds_no_text(field)
        )
        is_changed = may_be_shown and value != field.get_default(call_default_factory=True)
        replaced = key == "train.global_batch_size" and config.train.tokens_per_batch is not None
        if (is_changed or ALWAYS_SHOWN.fullmatch(key)) and not replaced:
            rows.append((f"`{key}`", _escaped(str(value).lower())))
    return rows


def _holds_no_text(field: FieldInfo) -> bool:
    """Whether the setting is a number, or one of a few names."""
    return field.annotation in (int, float, bool) or get_origin(field.annotation) is Literal


def _data(data: DataConfig) -> list[str]:
    """What was trained and evaluated on, by name."""
    if (corpus := data.synthetic) is not None:
        what = f"{corpus.train_examples} examples to train on and {corpus.validation_examples} to evaluate"
        text = f"A corpus that qa_dist generates from seed {corpus.seed}: {what}, of a few kinds of sentences."
        return ["## Data", f"{text} A model that was trained on nothing else is useless on real texts."]
    if data.dataset is not None:
        name = _named(data.dataset, "datasets/") + (f", {_escaped(data.dataset_config)}" if data.dataset_config else "")
        splits = [f"{name}, split {_escaped(s)}" if s else "" for s in (data.train_split, data.validation_split)]
    else:
        splits = [_escaped(listing([file_name(file) for file in f])) for f in (data.train_file, data.validation_file)]
    if data.validation_share:
        splits[1] = f"a share of {data.validation_share} of these, in whole texts, that was not trained on"
    lines = [f"- {name}: {text}" for name, text in zip(("Training", "Validation"), splits, strict=True) if text]
    return ["## Data", "\n".join(lines)] if lines else []


# ------------------------------------------------------------------------------------------------------ plot


def curves(run: Path) -> bytes | None:
    """A plot of the run in `run` as a PNG: the losses over the steps, and the headline figures over the epochs.

    None where there is nothing to draw. The same files give the same bytes.
    """
    # Without pyplot, which keeps state of its own and is not made for threads.
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    read = _Run.read(run)
    if not (panels := read.panels):
        return None
    content = io.BytesIO()
    with style.context("default"):  # whatever the user's own settings of matplotlib are
        figure = Figure(figsize=(4.8 * len(panels), 3.4), dpi=120, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            draw(axes, read)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _draw_losses(axes: Any, read: _Run) -> None:
    axes.set(title="Loss", xlabel="optimizer step", ylabel="loss")
    if read.losses:
        parts = np.array_split(np.array(read.losses, dtype=np.float64), min(len(read.losses), MOST_POINTS))
        steps, losses = np.array([part.mean(axis=0) for part in parts]).T
        smooth = _smoothed(losses)
        if smooth is not losses:
            axes.plot(steps, losses, color="#0072b2", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color="#0072b2", label="training" if smooth is losses else "training, smoothed")
    if points := read.points("step", "loss"):
        axes.plot(*zip(*points, strict=True), "o--", color="#d55e00", markersize=4, label="validation")


def _draw_scores(axes: Any, read: _Run) -> None:
    axes.set(title="Validation", xlabel="epoch", ylabel=read.task.card.unit)
    axes.set_prop_cycle(color=["#009e73", "#aa4499", "#e69f00", "#56b4e9"], marker=["o", "s", "^", "D"])
    for name in read.task.card.metrics:
        if points := read.points("epoch", name):
            axes.plot(*zip(*points, strict=True), markersize=4, label=read.task.headline[name])


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """Moving average; `losses` itself where they are smooth, or too few to tell."""
    if len(losses) < 20 or np.median(np.abs(np.diff(losses))) < 0.02 * np.ptp(losses):
        return losses
    window = np.ones(2 * (len(losses) // 40) + 3)
    return np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")  # fewer at the ends
