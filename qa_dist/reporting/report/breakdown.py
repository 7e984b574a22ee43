"""Figures over groups of examples, of one run or of two, whatever the task."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qa_dist.tasks.task import Review, ReviewedExample

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Row:
    """A group of examples."""

    name: str
    count: int
    means: list[float]
    """Of each figure, in the review's order."""
    other: list[float] | None = None
    """The same for the run that is compared with."""


@dataclass(frozen=True)
class Breakdown:
    """The examples, grouped in one way."""

    name: str
    rows: list[Row]


@dataclass(frozen=True)
class CalibrationBin:
    """The examples whose confidence is between `low` (not included, but for 0) and `high`."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean, 0 to 1."""
    right: float
    """Share, 0 to 1."""


@dataclass(frozen=True)
class Calibration:
    """How far the probabilities that a model gives are the shares in which it is right."""

    bins: list[CalibrationBin]
    """Those that hold examples."""
    error: float
    """Expected calibration error: the mean distance of confidence and share, over the examples (Guo et al. 2017)."""


@dataclass
class Comparison:
    """Two reviews of the same examples, matched by id."""

    pairs: list[tuple[ReviewedExample, ReviewedExample]]
    """This run's and the other's, in the order of this run's."""
    only_here: int
    only_there: int
    differing: set[str] = field(default_factory=set)
    """Ids of pairs whose texts or accepted outputs are not the same."""

    @classmethod
    def of(cls, here: Review, there: Review) -> "Comparison":
        others = {example.id: example for example in there.examples}
        pairs = [(example, others[example.id]) for example in here.examples if example.id in others]
        differing = {a.id for a, b in pairs if _content(a) != _content(b)}
        return cls(pairs, len(here.examples) - len(pairs), len(others) - len(pairs), differing)

    @property
    def fixed(self) -> int:
        """Examples that only this run gets right."""
        return sum(a.is_right and not b.is_right for a, b in self.pairs)

    @property
    def broken(self) -> int:
        """Examples that only the other run gets right."""
        return sum(b.is_right and not a.is_right for a, b in self.pairs)

    @property
    def changed(self) -> int:
        return sum(a.predicted != b.predicted for a, b in self.pairs)

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.only_here or self.only_there:
            notes.append(
                f"{len(self.pairs):,} examples are in both runs, {self.only_here:,} only in this one and "
                f"{self.only_there:,} only in the other; only those in both are compared."
            )
        if self.differing:
            notes.append(
                f"{len(self.differing):,} examples have the same id in both runs, but not the same text or gold: "
                "their figures cannot be compared."
            )
        return notes


def _content(example: ReviewedExample) -> tuple[str, str, frozenset[str]]:
    return example.heading, example.text, frozenset(example.expected)


def breakdowns(review: Review, comparison: Comparison | None = None) -> list[Breakdown]:
    """The means of all figures over all examples, then over the groups of every grouping that are not empty.

    With a `comparison`, over the examples that are in both runs, grouped as in this one.
    """
    pairs = comparison.pairs if comparison else [(example, None) for example in review.examples]

    def row(name: str, chosen: Sequence[tuple[ReviewedExample, ReviewedExample | None]]) -> Row:
        means = [float(np.mean([a.figures[figure] for a, _ in chosen])) for figure in review.figures]
        others = [b for _, b in chosen if b is not None]
        other = [float(np.mean([b.figures[figure] for b in others])) for figure in review.figures] if others else None
        return Row(name, len(chosen), means, other)

    found = [Breakdown("all examples", [row("all", pairs)])] if pairs else []
    for grouping, groups in review.groupings.items():
        members = {group: [pair for pair in pairs if pair[0].groups.get(grouping) == group] for group in groups}
        rows = [row(group, chosen) for group, chosen in members.items() if chosen]
        if rows:
            found.append(Breakdown(grouping, rows))
    return found


def calibration(examples: Sequence[ReviewedExample]) -> Calibration | None:
    """Of the examples whose confidence is known; None where there are none."""
    known = [(example.confidence, example.is_right) for example in examples if example.confidence is not None]
    if not known:
        return None
    confidence, right = (np.array(column, dtype=float) for column in zip(*known, strict=True))
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1).astype(int)
    bins = [
        CalibrationBin(
            i / CALIBRATION_BINS,
            (i + 1) / CALIBRATION_BINS,
            int(chosen.sum()),
            float(confidence[chosen].mean()),
            float(right[chosen].mean()),
        )
        for i in range(CALIBRATION_BINS)
        if (chosen := place == i).any()
    ]
    error = sum(one.count * abs(one.confidence - one.right) for one in bins) / len(known)
    return Calibration(bins, error)
