"""Plots of a run's metrics."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.support.files import write_atomically


def plot_metrics(path: Path, metrics: Sequence[dict[str, Any]]) -> None:
    """Write a PNG of the loss (its part over means and over variances) and of ‖Δ‖ over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True)
    steps = [entry["step"] for entry in metrics]
    for name, label in (("loss", "loss"), ("loss_mean", "over means"), ("loss_variance", "over variances")):
        upper.plot(steps, [entry[name] for entry in metrics], label=label, linewidth=1)
    upper.set_ylabel("loss")
    upper.legend()
    lower.plot(steps, [entry["difference_norm"] for entry in metrics], color="black", linewidth=1)
    lower.set_yscale("log")
    lower.set_ylabel("‖Δ‖, distance of the moments")
    lower.set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())
