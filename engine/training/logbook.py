"""What a run tells while it trains: `metrics.jsonl`, TensorBoard's events, progress, and the plot of its metrics.

Nothing here knows a method: every scalar that a step returns is logged under its own name.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from engine.support.errors import pip_line
from engine.support.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("gfmn")

_LINES = 20
# How series are named in plots, and which are drawn on a logarithmic scale of their own.
LABELS = {
    "loss": "loss",
    "loss_mean": "over means",
    "loss_variance": "over variances",
    "difference_norm": "‖Δ‖, distance of the moments",
}
_LOGARITHMIC = ("difference_norm",)
_NOT_PLOTTED = ("step", "images_per_second", "peak_memory_bytes", "lr")


class NoEvents:
    """Takes the place of a SummaryWriter and writes nothing."""

    def add_scalar(self, *_: Any) -> None:
        """Nothing."""

    def add_image(self, *_: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


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


class Logbook:
    """The log of one run, from `step` of `total` on. A context manager.

    Args:
        metrics: the file of one JSON object per logged step.
        tensorboard: the folder of TensorBoard's events.
        step: the steps taken so far; later events in the folder are dropped.
        total: the last step.
    """

    def __init__(self, metrics: Path, tensorboard: Path, step: int, total: int):
        self.metrics, self.total = metrics, total
        self.writer = event_writer(tensorboard, purge_step=step + 1)
        self.bar = tqdm(total=total, initial=step, desc="training", unit="step", disable=None, dynamic_ncols=True)
        self.every = max(total // _LINES, 1)
        self.next = step + 1
        self.begun, self.first = time.perf_counter(), step

    def __enter__(self) -> Logbook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.writer.close()

    def advance(self) -> None:
        """One more step has been taken."""
        self.bar.update()

    def write(self, entry: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> None:
        """Log `entry`, with "step", "loss" and "images_per_second" among its numbers, and what an evaluation found."""
        step = entry["step"]
        scalars = {name: value for name, value in entry.items() if name != "step"}
        line = dict(entry)
        if evaluation is not None:
            line["evaluation"] = dict(evaluation)
            scalars |= {f"evaluation/{key}": value for key, value in evaluation.items() if isinstance(value, float)}
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.bar.set_postfix(loss=f"{entry['loss']:.4g}", images_per_second=f"{entry['images_per_second']:.0f}")
        if self.bar.disable:
            self._line(step, entry)

    def picture(self, name: str, picture: Tensor, step: int) -> None:
        """A uint8 picture [3, H, W] for TensorBoard."""
        self.writer.add_image(name, picture, step)

    def _line(self, step: int, entry: Mapping[str, Any]) -> None:
        """About twenty lines over a run, where a bar cannot be drawn."""
        if step < self.next and step != self.total:
            return
        self.next = step + self.every
        left = (time.perf_counter() - self.begun) / (step - self.first) * (self.total - step)
        log.info(
            "step %d/%d  loss %.4g  %.0f images/s  %.0f s left",
            step,
            self.total,
            entry["loss"],
            entry["images_per_second"],
            left,
        )


def plot_metrics(path: Path, metrics: Sequence[dict[str, Any]]) -> bool:
    """Write a PNG of every series of the log over the steps: the loss and its parts, and what is of another scale.

    Returns whether it did: without matplotlib there is no plot, and a warning that says so.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        _warn_once(f"matplotlib is not installed: no {path.name} ({pip_line('matplotlib')})")
        return False
    names = [name for name, value in metrics[-1].items() if name not in _NOT_PLOTTED and isinstance(value, float)]
    parts = [name for name in names if name not in _LOGARITHMIC]
    others = [name for name in names if name in _LOGARITHMIC]
    figure = Figure(figsize=(9, 3 + 3 * len(others)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(others), sharex=True, squeeze=False)[:, 0]
    steps = [entry["step"] for entry in metrics]
    for name in parts:
        axes[0].plot(steps, [entry.get(name) for entry in metrics], label=LABELS.get(name, name), linewidth=1)
    axes[0].set_ylabel("loss")
    axes[0].legend()
    for axis, name in zip(axes[1:], others, strict=True):
        axis.plot(steps, [entry.get(name) for entry in metrics], color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_ylabel(LABELS.get(name, name))
    axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())
    return True
