"""Which charts a report has, of one run or of two."""

from dataclasses import dataclass

from qa_dist.reporting.report.breakdown import Calibration
from qa_dist.reporting.report.charts import Chart, Points, Series, chart
from qa_dist.reporting.report.reading import Story
from qa_dist.tasks.task import ReviewCurve

HERE, THERE = "this run", "other run"


@dataclass(frozen=True)
class Panel:
    """A figure of training that has a chart of its own."""

    id: str
    title: str
    name: str
    """In metrics.jsonl."""
    from_zero: bool = False


PANELS = (
    Panel("learning-rate", "Learning rate", "learning_rate", True),
    Panel("gradient-norm", "Gradient norm", "grad_norm", True),
    Panel("samples", "Samples per second", "samples_per_second", True),
    Panel("tokens", "Tokens per second", "tokens_per_second", True),
)


def training_charts(story: Story, other: Story | None) -> list[Chart]:
    """The losses, the task's headline figures, and the figures of speed and health; those that have points."""
    runs = [(story, HERE), *([(other, THERE)] if other else [])]

    def overlaid(
        kind: str, name: str, label: str, x: str = "step", *, style: int = 0, is_dotted: bool = False
    ) -> list[Series]:
        return [
            Series(
                f"{label}, {whose}" if other else label,
                run.log.points(kind, name, x),
                style,
                is_other=run is other,
                is_dotted=is_dotted,
            )
            for run, whose in runs
        ]

    task = story.task
    found = [
        chart(
            "loss",
            "Loss",
            "step",
            [
                *overlaid("train", "loss", "training"),
                *overlaid("evaluation", "loss", "validation", style=1, is_dotted=True),
            ],
        )
    ]
    scores = [
        series
        for style, name in enumerate(task.card.metrics)
        for series in overlaid("evaluation", name, task.headline.get(name, name), "epoch", style=style, is_dotted=True)
    ]
    found.append(chart("scores", f"Validation, {task.card.unit}", "epoch", scores))
    for panel in PANELS:
        series = overlaid("train", panel.name, panel.title.lower())
        found.append(chart(panel.id, panel.title, "step", series, from_zero=panel.from_zero))
    return [one for one in found if one is not None]


def review_curve(id: str, curve: ReviewCurve, other: ReviewCurve | None) -> Chart | None:
    """A curve of the task's own."""
    series = []
    for one, whose in ((curve, HERE), (other, THERE)):
        for style, (name, points) in enumerate(one.series.items() if one else ()):
            label = f"{name}, {whose}" if other else name
            series.append(Series(label, points, style, is_other=whose == THERE))
    return chart(id, curve.title, curve.x, series, marked=curve.marked)


def calibration_chart(here: Calibration, there: Calibration | None) -> Chart | None:
    """Share right over the mean probability, beside the line on which the two are the same."""

    def points(found: Calibration) -> Points:
        return [(one.confidence, one.right) for one in found.bins]

    series = [Series(f"share right, {HERE}" if there else "share right", points(here), is_dotted=True)]
    if there:
        series.append(Series(f"share right, {THERE}", points(there), is_other=True, is_dotted=True))
    series.append(Series("perfect calibration", [(0.0, 0.0), (1.0, 1.0)], style=3))
    return chart("calibration", "Calibration", "mean probability", series, limits=(0.0, 1.0))
