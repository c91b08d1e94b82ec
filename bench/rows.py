"""Rows of measurements, whatever was measured; how times and memory are taken; tables and files of rows.

A benchmark defines a subclass of `Row` with its own fields for each kind of table that it prints.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.profiler import profile

from engine.support.files import atomic_file, write_atomically
from engine.training.precision import cpu_computes_in
from engine.training.profiling import quiet_profiler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More than what the caches hold of a GPU, or of the part of a CPU that a few threads reach.
FLUSHED_BYTES = 2**27

Name = TypeVar("Name")
Measured = TypeVar("Measured")
RowKind = TypeVar("RowKind", bound="Row")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, machine and commit: what a number measured on `device` depends on besides the code it measures."""
    return {
        "versions": dict(_versions()),
        "processor": _processor(torch.device(device)),
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


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {_arithmetic()}, {os.cpu_count()} CPUs"
    return f"{platform.machine()}, {_arithmetic()}, {os.cpu_count()} CPUs"


def _arithmetic() -> str:
    """The CPU's vector instructions, and whether bf16 is among what it computes in."""
    name = torch.backends.cpu.get_cpu_capability()
    return f"{name} with{'' if cpu_computes_in(torch.bfloat16) else 'out'} bf16"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table. A field that is None by default stands in no file while it is None.

    Attributes:
        environment: what `environment()` said when the row was made: versions, processor, threads, load, commit, date.
    """

    environment: Mapping[str, Any] = field(default_factory=environment, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Field name → value, in the order of the class, the environment last."""
        given = {entry.name: (getattr(self, entry.name), entry.default) for entry in fields(self)}
        values = {name: value for name, (value, default) in given.items() if value is not None or default is not None}
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


def synchronize(device: torch.device | str) -> None:
    """Wait for `device` if it is a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device | str) -> float:
    """Wall-clock time of `call`, the work of `device` included."""
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begun


def cold_seconds(call: Callable[[], object], device: torch.device | str) -> float:
    """`seconds` from caches of `device` that hold something else: `FLUSHED_BYTES` of its memory are written first."""
    _other_memory(str(device)).zero_()
    return seconds(call, device)


@functools.cache
def _other_memory(device: str) -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)


def rounds(
    calls: Mapping[Name, Callable[[], object]],
    repetitions: int,
    measured: Callable[[Callable[[], object]], Measured],
    warmup: int = 0,
) -> Iterator[dict[Name, list[Measured]]]:
    """Measure all `calls` in turn, `repetitions` times, so that whatever else the machine does hits all of them alike.

    Yields what was found so far after every round: a benchmark that is stopped keeps the rounds before.

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
        if repetition >= warmup:
            yield {name: list(values) for name, values in found.items()}


def interleaved(
    calls: Mapping[Name, Callable[[], object]],
    repetitions: int,
    measured: Callable[[Callable[[], object]], Measured],
    warmup: int = 0,
) -> dict[Name, list[Measured]]:
    """What the last of `rounds` has found."""
    *_, found = rounds(calls, repetitions, measured, warmup)
    return found


def peak_memory(call: Callable[[], object], device: torch.device | str) -> int:
    """Bytes of `device` that `call` allocates at most at the same time, on top of what was allocated before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    return int(max(np.cumsum([0, *memory_changes(call)])))


def memory_changes(call: Callable[[], object]) -> list[int]:
    """Bytes of a CPU that `call` allocates, and with a minus those that it frees, one after the other."""
    quiet_profiler()
    with profile(profile_memory=True) as events:
        call()
    kineto = events.profiler.kineto_results.events()
    return [event.nbytes() for event in kineto if event.name() == "[memory]"]


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


class RowFile:
    """A benchmark's rows, and the file that holds them all as soon as they are there.

    Every change writes the whole file again, or nothing: a benchmark that is killed keeps what it had. What cannot be
    replaced (a pipe, this process's own output) is written once, at the end of the context.

    Args:
        path: None for no file.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: list[Row] = []
        self._replaced = path is not None and _is_replaced(path)

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.path is not None and not self._replaced:
            write_json(self.path, self.rows)

    def keep(self, rows: Iterable[RowKind]) -> list[RowKind]:
        """Take all of `rows`, each as it comes, and return them."""
        kept = []
        for row in rows:
            kept.append(row)
            self.rows.append(row)
            self._write()
        return kept

    def keep_latest(self, tables: Iterable[Sequence[RowKind]]) -> Sequence[RowKind]:
        """Take the last of several tables, each of which replaces the one before as it comes, and return it."""
        before = list(self.rows)
        latest: Sequence[RowKind] = ()
        for latest in tables:
            self.rows = [*before, *latest]
            self._write()
        return latest

    def _write(self) -> None:
        if self.path is not None and self._replaced:
            write_json(self.path, self.rows)


def _is_replaced(path: Path) -> bool:
    """Whether `atomic_file` would replace what is there, instead of writing through."""
    if not path.exists():
        return True
    own = []
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed
            own.append(os.fstat(descriptor))
    return path.is_file() and not any(os.path.samestat(path.stat(), stream) for stream in own)


def save_figure(path: Path, figure: Figure, dpi: float | str = "figure") -> None:
    """Draw a figure as PNG, the whole file or nothing. InputError if the file cannot be written."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def read_json(path: Path, kind: type[RowKind]) -> list[RowKind]:
    """The rows that `write_json` wrote. OSError, TypeError or ValueError if the file holds anything else."""
    return [kind(**values) for values in json.loads(path.read_text())]


def newest_file(folder: Path, kind: str) -> Path | None:
    """The newest file `KIND_YYYY-MM-DD.json` of `folder`; None if there is none."""
    files = [path for path in folder.glob("*.json") if re.fullmatch(rf"{re.escape(kind)}_\d{{4}}-\d\d-\d\d", path.stem)]
    return max(files, default=None)
