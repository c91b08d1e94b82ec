"""Rows of measurements, whatever was measured; how times and memory are taken; tables and files of rows.

A benchmark defines a subclass of `Row` with its own fields for each kind of table that it prints.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.profiler import profile

from engine.support.files import atomic_file, write_atomically
from engine.training.profiling import quiet_profiler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More than what the caches hold of a GPU, or of the part of a CPU that a few threads reach.
FLUSHED_BYTES = 2**27

Name = TypeVar("Name")
Measured = TypeVar("Measured")
RowKind = TypeVar("RowKind", bound="Row")


def environment() -> dict[str, Any]:
    """Versions, machine and commit: what a number depends on besides the code it measures."""
    return {
        "versions": dict(_versions()),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "numpy", "triton", "nvidia-dali-cuda130"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return described.stdout.strip() or "unknown"


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} CPUs"
    return f"{platform.machine()}, {os.cpu_count()} CPUs"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table.

    Attributes:
        environment: what `environment()` said when the row was made: versions, processor, threads, load, commit, date.
    """

    environment: Mapping[str, Any] = field(default_factory=environment, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Field name → value, in the order of the class, the environment last."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["environment"] = values.pop("environment")
        return values

    def cells(self) -> Mapping[str, object]:
        """Heading → cell of the printed table; the fields as they are, unless a subclass says it better."""
        values = self.as_json()
        del values["environment"]
        return values


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, the 50th (median) and the 80th percentile."""
    p20, p50, p80 = np.percentile(values, (20, 50, 80)).tolist()
    return p20, p50, p80


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of `call`, the GPU's work included."""
    synchronize()
    begun = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begun


def cold_seconds(call: Callable[[], object]) -> float:
    """`seconds` from caches that hold something else: `FLUSHED_BYTES` of other memory are written first."""
    _other_memory("cuda" if torch.cuda.is_available() else "cpu").zero_()
    return seconds(call)


@functools.cache
def _other_memory(device: str) -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)


def interleaved(
    calls: Mapping[Name, Callable[[], object]],
    repetitions: int,
    measured: Callable[[Callable[[], object]], Measured],
    warmup: int = 0,
) -> dict[Name, list[Measured]]:
    """Measure all `calls` in turn, `repetitions` times, so that whatever else the machine does hits all of them alike.

    Args:
        calls: what to measure, by name. Nobody checks here that they compute the right thing.
        repetitions: rounds; each takes the calls in another order, the same in every run.
        measured: runs a call and returns what is wanted of it, such as `seconds`.
        warmup: rounds before these, whose results are dropped.
    """
    found: dict[Name, list[Measured]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    for repetition in range(warmup + repetitions):
        for name, call in shuffle.sample(list(calls.items()), len(calls)):
            value = measured(call)
            if repetition >= warmup:
                found[name].append(value)
    return found


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that `call` allocates at most at the same time, on top of what was allocated before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    quiet_profiler()
    with profile(profile_memory=True) as events:
        call()
    kineto = events.profiler.kineto_results.events()
    changes = [event.nbytes() for event in kineto if event.name() == "[memory]"]
    return int(max(np.cumsum([0, *changes])))


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table of cells as `str` shows them."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def print_rows(rows: Sequence[Row]) -> None:
    """Print rows of one kind as a Markdown table, the columns of their `cells`."""
    print(table(list(rows[0].cells()), [list(row.cells().values()) for row in rows]))


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a list of objects, the whole file or nothing. InputError if the file cannot be written."""
    write_atomically(path, (json.dumps([row.as_json() for row in rows], indent=1) + "\n").encode())


def save_figure(path: Path, figure: Figure, dpi: float | str = "figure") -> None:
    """Draw a figure as PNG, the whole file or nothing. InputError if the file cannot be written."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def read_json(path: Path, kind: type[RowKind]) -> list[RowKind]:
    """The rows that `write_json` wrote. OSError, TypeError or ValueError if the file holds anything else."""
    return [kind(**values) for values in json.loads(path.read_text())]
