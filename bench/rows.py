"""A benchmark's row: what was timed, how long it took, on what; and how the times are taken."""

from __future__ import annotations

import functools
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import profile

from engine.training.profiling import quiet_profiler

# More than what the caches hold of a GPU, or of the part of a CPU that a few threads reach.
FLUSHED_BYTES = 2**27


def environment() -> dict[str, Any]:
    """Versions, machine and commit: what a number depends on besides the code it measures."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "numpy", "triton", "nvidia-dali-cuda130"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} CPUs"
    return f"{platform.machine()}, {os.cpu_count()} CPUs"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        op: the operation.
        backend: who did it.
        shape, dtype: of the activations (or buffers) it was done to.
        p20, p50, p80: µs per call.
        relative: p50 divided by that of the first backend of the same comparison.
        bytes_per_second: bytes that the operation has to move at least, by p50; 0 if nobody counted them.
        peak_memory: bytes allocated during one call, at most at the same time.
        environment: see `environment`.
    """

    op: str
    backend: str
    shape: str
    dtype: str
    p20: float
    p50: float
    p80: float
    relative: float
    bytes_per_second: float
    peak_memory: int
    environment: Mapping[str, Any] = field(default_factory=environment, repr=False)


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that `call` allocates on top of what is there, at most at the same time."""
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


@functools.cache
def _other_memory(device: str) -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)


def _timed(call: Callable[[], object]) -> float:
    """µs that `call` takes, on caches that hold something else."""
    on_gpu = torch.cuda.is_available()
    _other_memory("cuda" if on_gpu else "cpu").zero_()
    if on_gpu:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begun)


def compare(
    op: str, shape: str, dtype: str, calls: Mapping[str, Callable[[], object]], repetitions: int, floor_bytes: int = 0
) -> list[Row]:
    """Time all `calls` in turn, `repetitions` times, so that whatever else the machine does hits all of them alike.

    Each time in another order, and from cold caches (`FLUSHED_BYTES` of other memory are written before every call).
    Every call has to have run before (compiled), and to have been found correct: nothing is checked here.
    """
    times: dict[str, list[float]] = {backend: [] for backend in calls}
    shuffle = random.Random(0)
    for _ in range(repetitions):
        for backend, call in shuffle.sample(list(calls.items()), len(calls)):
            times[backend].append(_timed(call))
    medians = {backend: float(np.median(taken)) for backend, taken in times.items()}
    first = medians[next(iter(calls))]
    return [
        Row(
            op=op,
            backend=backend,
            shape=shape,
            dtype=dtype,
            p20=float(np.percentile(times[backend], 20)),
            p50=medians[backend],
            p80=float(np.percentile(times[backend], 80)),
            relative=medians[backend] / first,
            bytes_per_second=floor_bytes / medians[backend] * 1e6,
            peak_memory=peak_memory(call),
        )
        for backend, call in calls.items()
    ]


def interleaved(calls: Mapping[Any, Callable[[], object]], repetitions: int, warmup: int = 1) -> dict[Any, list[float]]:
    """Seconds of `repetitions` calls of each, in another order every time, after `warmup` untimed ones."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    for repetition in range(warmup + repetitions):
        for name, call in shuffle.sample(list(calls.items()), len(calls)):
            begun = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition >= warmup:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_json(path: Path, rows: Sequence[Any]) -> None:
    """Rows (dataclasses) as a list of objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
