"""The sections on logged numbers: losses, and evaluations if there were any."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

from engine.reporting.charts import Chart, line_chart, number

# What a number is called on Inception's features; on those of another network; and what it is not there.
_EVALUATIONS = {
    "frechet_distance": ("FID", "Fréchet distance", " (not FID)"),
    "kernel_distance": ("KID", "kernel distance", " (not KID)"),
    "precision": ("precision", "precision", ""),
    "recall": ("recall", "recall", ""),
}


def _series(metrics: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in metrics if is_number(entry.get(name))]


def is_number(value: object) -> TypeGuard[float]:
    """A finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def loss_charts(metrics: list[dict[str, Any]]) -> list[Chart]:
    """Of the entries of metrics.jsonl."""
    parts = {"loss": "loss", "loss_mean": "over means", "loss_variance": "over variances"}
    rates = _series(metrics, "lr")
    charts = [
        line_chart("Loss", {label: _series(metrics, name) for name, label in parts.items()}),
        line_chart(
            "‖Δ‖, distance of the moments to the target",
            {"": _series(metrics, "difference_norm")},
            log=True,
        ),
        line_chart("Images per second", {"": _series(metrics, "images_per_second")}),
        line_chart("Learning rate", {"": rates}) if len({rate for _, rate in rates}) > 1 else None,
    ]
    return [chart for chart in charts if chart is not None]


@dataclass(frozen=True)
class Evaluation:
    """The evaluations of one network: columns and rows of a table, and a chart for each number."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    charts: list[Chart]


def evaluations(metrics: list[dict[str, Any]]) -> list[Evaluation]:
    """The evaluations among the entries of metrics.jsonl, network by network."""
    found: dict[tuple[str, bool], list[tuple[int, dict[str, Any]]]] = {}
    for entry in metrics:
        values = entry.get("evaluation")
        if isinstance(values, dict):
            key = str(values.get("network", "unknown")), bool(values.get("is_inception"))
            found.setdefault(key, []).append((entry["step"], values))
    return [_evaluation(network, inception, rows) for (network, inception), rows in found.items()]


def _evaluation(network: str, inception: bool, entries: list[tuple[int, dict[str, Any]]]) -> Evaluation:
    names = [name for name in _EVALUATIONS if any(is_number(values.get(name)) for _, values in entries)]
    rows, columns, titles = [], ["step", "samples"], {}
    for name in names:
        label, other, remark = _EVALUATIONS[name]
        columns.append(label if inception else other + remark)
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
    return Evaluation("Inception features" if inception else f"{network} features", columns, rows, shown)
