"""The charts of a run's logged numbers, whatever its method logs, and its evaluations if there are any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from engine.reporting.charts import Chart, Point, line_chart, number
from engine.training.held_out import judged

Entries = Sequence[dict[str, Any]]
"""The objects of metrics.jsonl, each with its "step"."""


@dataclass(frozen=True)
class _KnownChart:
    """How known series are drawn: a title, and the label of each series in the legend.

    Attributes:
        log: on a logarithmic axis.
        changing: only if there are two different values.
        last: after the charts of unknown series.
    """

    title: str
    labels: dict[str, str]
    log: bool = False
    changing: bool = False
    last: bool = False


_KNOWN = (
    _KnownChart("Loss", {"loss": "loss", "loss_mean": "over means", "loss_variance": "over variances"}),
    _KnownChart("‖Δ‖, distance of the moments to the target", {"difference_norm": ""}, log=True),
    _KnownChart("Images per second", {"images_per_second": ""}, last=True),
    _KnownChart("Learning rate", {"lr": ""}, changing=True, last=True),
)
_NOT_DRAWN = {"step", "peak_memory_bytes"}

# A distance's name if the features are Inception's; if they are another network's; and what to add then.
_EVALUATIONS = {
    "frechet_distance": ("FID", "Fréchet distance", " (not FID)"),
    "kernel_distance": ("KID", "kernel distance", " (not KID)"),
    "precision": ("precision", "precision", ""),
    "recall": ("recall", "recall", ""),
}


def distance_name(name: str, inception: bool) -> str:
    """What people call a distance, on Inception's features or on another network's."""
    label, other, remark = _EVALUATIONS[name]
    return label if inception else other + remark


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite int or float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def logged_charts(metrics: Entries) -> list[Chart]:
    """A chart for every number that was logged: the losses first, then what the method adds, speed and rate last.

    Series that `_KNOWN` does not name have charts of their own, under their own names, in the order in which they were
    first logged.
    """
    drawn = _NOT_DRAWN.union(*(chart.labels for chart in _KNOWN))
    added = [
        _KnownChart(name, {name: ""})
        for name in dict.fromkeys(name for entry in metrics for name, value in entry.items() if is_number(value))
        if name not in drawn
    ]
    ordered = sorted([*_KNOWN, *added], key=lambda chart: chart.last)  # a stable order
    return [chart for chart in (_logged_chart(metrics, known) for known in ordered) if chart is not None]


def _logged_chart(metrics: Entries, known: _KnownChart) -> Chart | None:
    lines = {label: _series(metrics, name) for name, label in known.labels.items()}
    if known.changing and len({y for points in lines.values() for _, y in points}) < 2:
        return None
    return line_chart(known.title, lines, log=known.log)


def _series(metrics: Entries, name: str) -> list[Point]:
    return [(entry["step"], entry[name]) for entry in metrics if is_number(entry.get(name))]


@dataclass(frozen=True)
class EvaluationTable:
    """The evaluations by one network: columns and rows of a table, and a chart for each distance."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    charts: list[Chart]


def evaluation_tables(metrics: Entries) -> list[EvaluationTable]:
    """The evaluations among the entries, network by network."""
    found: dict[tuple[str, bool], list[tuple[int, dict[str, Any]]]] = {}
    for entry in metrics:
        evaluation = entry.get("evaluation")
        for values in judged(evaluation) if isinstance(evaluation, dict) else ():
            key = str(values.get("network", "unknown")), bool(values.get("is_inception"))
            found.setdefault(key, []).append((entry["step"], values))
    return [_evaluation_table(network, inception, rows) for (network, inception), rows in found.items()]


def _evaluation_table(network: str, inception: bool, entries: list[tuple[int, dict[str, Any]]]) -> EvaluationTable:
    names = [name for name in _EVALUATIONS if any(is_number(values.get(name)) for _, values in entries)]
    rows, columns, titles = [], ["step", "samples"], {}
    for name in names:
        label, other, remark = _EVALUATIONS[name]
        columns.append(distance_name(name, inception))
        titles[name] = label if inception else f"{other} on {network} features{remark}"
    for step, values in entries:
        cells = [f"{values[name]:#.4g}" if is_number(values.get(name)) else "–" for name in names]
        if "kernel_distance" in names and is_number(values.get("kernel_distance_std")):
            cells[names.index("kernel_distance")] += f" ± {values['kernel_distance_std']:#.2g}"
        samples: object = values.get("samples")
        rows.append([number(step), number(samples) if is_number(samples) else "–", *cells])
    charts = [
        line_chart(
            title[0].upper() + title[1:],
            {"": [(step, values[name]) for step, values in entries if is_number(values.get(name))]},
        )
        for name, title in titles.items()
    ]
    shown = [chart for chart in charts if chart is not None] if len(entries) > 1 else []
    return EvaluationTable("Inception features" if inception else f"{network} features", columns, rows, shown)
