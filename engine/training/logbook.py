"""What a run writes for people to look at: event files for TensorBoard, and plots of its metrics."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.support.errors import pip_line
from engine.support.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("gfmn")


class NoEvents:
    """Takes the place of a SummaryWriter and writes nothing."""

    def add_scalar(self, *_: Any) -> None: ...

    def add_image(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def event_writer(folder: Path, purge_step: int) -> SummaryWriter | NoEvents:
    """A writer of event files into `folder` that hides older events from `purge_step` on.

    Without TensorBoard one that writes nothing; a warning says so once.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _warn_once(f"TensorBoard is not installed: no event files ({pip_line('tensorboard')})")
        return NoEvents()
    return SummaryWriter(str(folder), purge_step=purge_step)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def plot_metrics(path: Path, metrics: Sequence[dict[str, Any]]) -> bool:
    """Write a PNG of the loss (its part over means and over variances) and of ‖Δ‖ over the steps.

    Returns whether it did: without matplotlib there is no plot, and a warning that says so.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        _warn_once(f"matplotlib is not installed: no {path.name} ({pip_line('matplotlib')})")
        return False

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
    return True
