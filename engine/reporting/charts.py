"""The geometry of small charts: the places of lines, ticks and labels in an SVG that a template draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

WIDTH, HEIGHT = 400, 224
LEFT, RIGHT, TOP, BOTTOM = 56, 388, 10, 196
_MOST_POINTS = 800

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name in the legend, and its points in SVG coordinates as `polyline` wants them."""

    name: str
    points: str
    dots: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """What a template draws. Ticks and marks are (position, label).

    Attributes:
        title: names the quantity and its unit.
        lines: in drawing order.
        x_ticks, y_ticks: along the axes.
        marks: vertical lines.
        x_label: under the axis.
        summary: the chart in words, for those who do not see it.
        averaged: how many logged points each drawn point is the mean of.
    """

    title: str
    lines: list[Line]
    x_ticks: list[tuple[str, str]]
    y_ticks: list[tuple[str, str]]
    marks: list[tuple[str, str]]
    x_label: str
    summary: str
    averaged: int


def line_chart(title: str, lines: Mapping[str, Sequence[Point]], *, log: bool = False) -> Chart | None:
    """Lines over training steps; None without a finite point. On a logarithmic axis only positive values are points."""
    averaged = max(math.ceil(max((len(points) for points in lines.values()), default=0) / _MOST_POINTS), 1)
    kept = {name: _finite(points, positive=log) for name, points in lines.items()}
    kept = {name: _thinned(points, averaged) for name, points in kept.items() if points}
    if not kept:
        return None
    summary = "; ".join(
        f"{name or title} from {number(points[0][1])} at step {number(points[0][0])} to {number(points[-1][1])} "
        f"at step {number(points[-1][0])}"
        for name, points in kept.items()
    )
    return _chart(title, kept, log=log, x_label="step", summary=summary, averaged=averaged)


def histogram_chart(
    title: str, values: dict[str, Sequence[float]], *, marks: dict[str, float], x_label: str, bins: int = 40
) -> Chart:
    """Histograms over shared bins from 0 on, in percent of each set of values; `marks` are vertical lines."""
    highest = max(max(numbers) for numbers in values.values()) or 1.0
    lines: dict[str, Sequence[Point]] = {}
    for name, numbers in values.items():
        counts, edges = np.histogram(numbers, bins=bins, range=(0, highest))
        shares = [100 * count / len(numbers) for count in counts.tolist()]
        corners = [(x, share) for i, share in enumerate(shares) for x in edges[i : i + 2].tolist()]
        lines[name] = [(0.0, 0.0), *corners, (highest, 0.0)]
    text = ", ".join(f"{label} at {number(x)}" for label, x in marks.items())
    return _chart(title, lines, log=False, x_label=x_label, summary=f"{title}; {text}", averaged=1, marks=marks)


def _chart(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    *,
    log: bool,
    x_label: str,
    summary: str,
    averaged: int,
    marks: dict[str, float] | None = None,
) -> Chart:
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_low, x_high = _widened(min(0.0, *xs), max(xs))
    y_low, y_high = (math.log10(min(ys)), math.log10(max(ys))) if log else (min(ys), max(ys))
    if not log and y_low > 0 and y_low < 0.5 * y_high:
        y_low = 0.0
    y_low, y_high = _widened(y_low, y_high)
    spare = 0.04 * (y_high - y_low)
    y_high, y_low = y_high + spare, y_low if y_low == 0 else y_low - spare

    def x_at(x: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * (x - x_low) / (x_high - x_low):.1f}"

    def y_at(y: float) -> str:
        return f"{BOTTOM - (BOTTOM - TOP) * ((math.log10(y) if log else y) - y_low) / (y_high - y_low):.1f}"

    y_ticks = log_ticks(y_low, y_high) if log else ticks(y_low, y_high)
    return Chart(
        title=title,
        lines=[
            Line(
                name,
                " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points),
                [(x_at(x), y_at(y)) for x, y in points] if len(points) <= 12 else [],
            )
            for name, points in lines.items()
        ],
        x_ticks=[(x_at(x), number(x)) for x in ticks(x_low, x_high)],
        y_ticks=[(y_at(y), number(y)) for y in y_ticks],
        marks=[(x_at(x), label) for label, x in (marks or {}).items()],
        x_label=x_label,
        summary=summary,
        averaged=averaged,
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in [low, high], at most `most` + 1 of them."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between 10^low and 10^high: 1, 2 and 5 of every power, or powers alone, or few of them."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [value for value in fine if low <= math.log10(value) <= high]
    if len(inside) < 3:
        return [value for value in ticks(10**low, 10**high, 4) if value > 0]
    if len(inside) > 6:
        inside = [10.0**power for power in powers if low <= power <= high]
    return inside[:: math.ceil(len(inside) / 6)]


def number(value: float) -> str:
    """A number as a person would write it: 12,000, 0.031, 1.2e−5."""
    if value == round(value) and abs(value) < 1e7:
        return f"{round(value):,}".replace("-", "−")
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.3g}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


def _widened(low: float, high: float) -> tuple[float, float]:
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    spare = abs(high) / 2 or 1.0
    return low - spare, high + spare


def _finite(points: Sequence[Point], *, positive: bool) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not positive)]


def _thinned(points: list[Point], size: int) -> list[Point]:
    """The means of every `size` consecutive points."""
    if size == 1:
        return points
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
