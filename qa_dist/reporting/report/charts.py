"""Line charts: from figures to the geometry that the page's template draws as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

WIDTH, HEIGHT = 420, 230
"""Of a chart, in the units of its SVG; one unit is about a pixel."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36
"""What axes and their labels take of it."""
CLOSE = 5.0
"""Two marks that are closer have one line."""
MOST_POINTS = 1000
"""Of a curve; of more, means are drawn."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Points
    style: int = 0
    """Number of its colour."""
    is_other: bool = False
    """Whether it is of the run that is compared with."""
    is_dotted: bool = False
    """Whether its points are few and each is shown."""


@dataclass(frozen=True)
class Line:
    """A series, drawn."""

    series: Series
    path: str
    """SVG path data."""
    places: list[tuple[float, float]]
    """Where its points are, in the SVG."""


@dataclass(frozen=True)
class Chart:
    """Everything that is drawn, in the units of the SVG."""

    id: str
    title: str
    x_name: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marked: list[tuple[float, str]] = field(default_factory=list)
    """Vertical lines: place and name."""
    summary: str = ""
    """For those who cannot see it."""
    note: str = ""

    @property
    def values(self) -> list[dict[str, object]]:
        """What the page needs to tell the figures under the pointer: for each line its name, and x, y, and their
        places."""
        return [
            {
                "name": line.series.name,
                "points": [
                    [_rounded(x), _rounded(y), px, py]
                    for (x, y), (px, py) in zip(line.series.points, line.places, strict=True)
                ],
            }
            for line in self.lines
        ]


def chart(
    id: str,
    title: str,
    x_name: str,
    series: Sequence[Series],
    *,
    marked: Mapping[str, float] | None = None,
    limits: tuple[float, float] | None = None,
    from_zero: bool = False,
) -> Chart | None:
    """The chart of all `series` that have points; None where none has.

    `limits` are those of both axes where they are known; `from_zero`: the vertical axis begins at zero.
    """
    longest = max((len(one.points) for one in series), default=0)
    series = [
        Series(one.name, thinned(one.points), one.style, one.is_other, one.is_dotted) for one in series if one.points
    ]
    if not series:
        return None
    xs = [x for one in series for x, _ in one.points] + list((marked or {}).values())
    ys = [y for one in series for _, y in one.points]
    x_low, x_high = limits or _widened(min(xs), max(xs))
    y_low, y_high = limits or _widened(0.0 if from_zero and min(ys) > 0 else min(ys), max(ys))
    are_whole = all(float(x).is_integer() for x in xs)  # no half steps or epochs
    y_marks = ticks(y_low, y_high)
    if not limits:  # up to a round number, so that the line has room below the chart's edge
        step = y_marks[1] - y_marks[0]
        y_high = y_marks[-1] if y_marks[-1] >= y_high else y_marks[-1] + step
        y_marks = [*y_marks, y_high] if y_high > y_marks[-1] else y_marks

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for one in series:
        places = [(across(x), down(y)) for x, y in one.points]
        lines.append(Line(one, "M" + "L".join(f"{px:g} {py:g}" for px, py in places), places))
    note = ""
    if longest > MOST_POINTS:
        note = f"Means of up to {math.ceil(longest / MOST_POINTS):,} neighbours; there are {longest:,} figures."
    return Chart(
        id,
        title,
        x_name,
        lines,
        [(across(x), label(x)) for x in ticks(x_low, x_high) if not are_whole or x.is_integer()],
        [(down(y), label(y)) for y in y_marks],
        _merged([(across(x), name) for name, x in (marked or {}).items()]),
        f"{title}. " + " ".join(_told(one, x_name) for one in series),
        note,
    )


def _merged(marked: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """With one line, and both names, for those that are as good as in the same place."""
    found: list[tuple[float, str]] = []
    for place, name in sorted(marked, key=lambda one: one[0]):
        if found and place - found[-1][0] < CLOSE:
            found[-1] = (found[-1][0], f"{found[-1][1]}, {name}")
        else:
            found.append((place, name))
    return found


def thinned(points: Points) -> Points:
    """At most `MOST_POINTS`: the means of neighbours, where there are more."""
    if len(points) <= MOST_POINTS:
        return points
    return [tuple(part.mean(axis=0).tolist()) for part in np.array_split(np.array(points, dtype=float), MOST_POINTS)]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at or above `low` to at or below `high`, at most `most`; at least two."""
    for most_now in (most, most + 4):
        rough = (high - low) / most_now
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first = math.ceil(low / step - 1e-9)
        found = [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
        if len(found) >= 2:
            return found
    return [low, high]


def label(value: float) -> str:
    """A number on an axis."""
    size = abs(value)
    if value < 0:
        return f"−{label(size)}"
    if size >= 10_000:
        return f"{value / 1000:,.4g}k" if size < 1e6 else f"{value:.3g}"
    return f"{value:.4g}" if size >= 1e-3 or value == 0 else f"{value:.2g}".replace("e-0", "e-")


def _widened(low: float, high: float) -> tuple[float, float]:
    size = max(abs(low), abs(high))
    if high - low > max(1e-6 * size, 1e-9):  # else the labels of an axis would be the same, and rounded off
        return low, high
    room = size * 0.1 if size > 1e-6 else 1.0 if low == high else 1e-6
    return low - room, high + room


def _rounded(value: float) -> float:
    return float(f"{value:.5g}") if not float(value).is_integer() else int(value)


def _told(one: Series, x_name: str) -> str:
    (first_x, first), (last_x, last) = one.points[0], one.points[-1]
    low, high = min(y for _, y in one.points), max(y for _, y in one.points)
    return (
        f"{one.name}: from {first:.4g} at {x_name} {first_x:.6g} to {last:.4g} at {last_x:.6g}; lowest {low:.4g}, "
        f"highest {high:.4g}."
    )
