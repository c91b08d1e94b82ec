"""What a run tells while it trains: `metrics.jsonl`, TensorBoard's events, progress, and the plot of its metrics.

Nothing here knows a method: every scalar that a step returns is logged under its own name.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from engine.support.errors import pip_line, reason
from engine.support.files import append_line, write_atomically
from engine.training.held_out import Judgements
from engine.training.run_folder import read_metrics

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


class Events:
    """TensorBoard's event file of a run. Where it cannot be written there is none, and one warning says so.

    Each event is in the file before training goes on; a SummaryWriter leaves that to a thread, whose errors get lost.

    Args:
        folder: where a new file is made.
        step: the first; events of older files from this step on are hidden.
    """

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        self._file: Any = None
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from torch.utils.tensorboard import RecordWriter, summary
        except ImportError:
            _warn_once(f"TensorBoard is not installed: no event files ({pip_line('tensorboard')})")
            return
        self._event, self._summary = Event, summary
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names.
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self._file = RecordWriter((folder / name).open("wb"))
        except OSError as error:
            self._give_up(error)
        self._write(file_version="brain.Event:2")
        self._write(step=step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A number of a step."""
        if self._file is not None:
            self._write(step=step, summary=self._summary.scalar(name, value))

    def image(self, name: str, picture: Tensor, step: int) -> None:
        """A uint8 picture [3, H, W] of a step."""
        if self._file is not None:
            self._write(step=step, summary=self._summary.image(name, picture, dataformats="CHW"))

    def close(self) -> None:
        """Nothing more will come."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # after a failure it tries to write what is left
                self._file.close()

    def _write(self, **fields: Any) -> None:
        if self._file is None:
            return
        try:
            self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._file = None
        log.warning("%s: could not be written, %s; training goes on without TensorBoard", self.folder, reason(error))


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
        self.events = Events(tensorboard, step + 1)
        self.bar = tqdm(total=total, initial=step, desc="training", unit="step", disable=None, dynamic_ncols=True)
        self.every = max(total // _LINES, 1)
        self.next = step + 1
        self.begun, self.first = time.perf_counter(), step
        self.judgements = Judgements(read_metrics(metrics))

    def __enter__(self) -> Logbook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.events.close()

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
            for other in evaluation.get("others", ()):
                numbers = {key: value for key, value in other.items() if isinstance(value, float)}
                scalars |= {f"evaluation/{key}[{other['network']}]": value for key, value in numbers.items()}
        append_line(self.metrics, json.dumps(line))
        if (warning := self.judgements.add(line)) is not None:
            log.warning("warning: step %d: %s", step, warning)
        for name, value in scalars.items():
            self.events.scalar(name, value, step)
        self.bar.set_postfix(loss=f"{entry['loss']:.4g}", images_per_second=f"{entry['images_per_second']:.0f}")
        if self.bar.disable:
            self._line(step, entry)

    def picture(self, name: str, picture: Tensor, step: int) -> None:
        """A uint8 picture [3, H, W] for TensorBoard."""
        self.events.image(name, picture, step)

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


class NoLogbook:
    """The log of a process that another one writes for."""

    def __enter__(self) -> NoLogbook:
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self) -> None: ...

    def write(self, entry: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> None: ...

    def picture(self, name: str, picture: Tensor, step: int) -> None: ...


def plot_metrics(path: Path, metrics: Sequence[dict[str, Any]]) -> bool:
    """Write a PNG of every series of the log over the steps that have it, in the order in which they were first logged:
    the loss and its parts, and what is of another scale.

    Returns whether it did: without matplotlib there is no plot, and a warning that says so.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        _warn_once(f"matplotlib is not installed: no {path.name} ({pip_line('matplotlib')})")
        return False
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in metrics:
        for name, value in entry.items():
            if name not in _NOT_PLOTTED and isinstance(value, float):
                series.setdefault(name, []).append((entry["step"], value))
    parts = [name for name in series if name not in _LOGARITHMIC]
    others = [name for name in series if name in _LOGARITHMIC]
    figure = Figure(figsize=(9, 3 + 3 * len(others)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(others), sharex=True, squeeze=False)[:, 0]
    for name in parts:
        axes[0].plot(*zip(*series[name], strict=True), label=LABELS.get(name, name), linewidth=1)
    axes[0].set_ylabel("loss")
    axes[0].legend()
    for axis, name in zip(axes[1:], others, strict=True):
        axis.plot(*zip(*series[name], strict=True), color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_ylabel(LABELS.get(name, name))
    axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())
    return True
