"""pytest-benchmark on the calls that `python -m bench.kernels` times in turn; a usual test run skips all of it.

    pytest tests/kernels/test_timings.py -o addopts= --benchmark-only

Nothing wrong is timed: the two functions that build the calls compare everybody with float64 first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.kernels.times import Timing, timing_of_averager, timings_of_tap
from bench.kernels.workloads import TapShape, short
from bench.rows import FLUSHED_BYTES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 30
TAPS = {"64x32x32": TapShape((64, 32, 32), residual=False), "512x2x2": TapShape((512, 2, 2), residual=False)}
# All features of vgg19 and resnet18 on images of 32×32.
AVERAGED_FEATURES = 851_968
# "ours" is what kernels="auto" chooses on this device.
AVERAGERS = ("ours", "plain PyTorch", "torch.compile")
EVERYBODY = (*AVERAGERS, "gfmn, reference", "ReLU in place and one read, torch.compile")


@functools.cache
def _timings(tap: str) -> dict[str, Timing]:
    return {timing.op: timing for timing in timings_of_tap(TAPS[tap], torch.bfloat16, DEVICE)}


@functools.cache
def _averager() -> Timing:
    return timing_of_averager(AVERAGED_FEATURES, DEVICE)


@functools.cache
def _other_memory() -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE)


def _cool_caches() -> None:
    _other_memory().zero_()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _finished(call: Callable[[], object]) -> None:
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _run(benchmark: BenchmarkFixture, timing: Timing, backend: str) -> None:
    name = next(iter(timing.calls)) if backend == "ours" else backend
    assert DEVICE == "cuda" or name != "gfmn, triton", "Triton's interpreter is not worth timing"
    benchmark.group = f"{timing.op}, {timing.shape}, {short(timing.dtype)}"
    benchmark.extra_info.update(backend=name, floor_bytes=timing.floor_bytes)
    benchmark.pedantic(_finished, (timing.calls[name],), setup=_cool_caches, rounds=ROUNDS, warmup_rounds=1)


# What is slow to prepare stands in the tests, not in fixtures: --benchmark-skip skips the tests alone.
@pytest.mark.parametrize("backend", EVERYBODY)
@pytest.mark.parametrize("op", ["relu_moments", "relu_moments_backward"])
@pytest.mark.parametrize("tap", TAPS)
def test_tap(benchmark: BenchmarkFixture, tap: str, op: str, backend: str) -> None:
    _run(benchmark, _timings(tap)[op], backend)


@pytest.mark.parametrize("backend", AVERAGERS)
def test_averager(benchmark: BenchmarkFixture, backend: str) -> None:
    _run(benchmark, _averager(), backend)
