"""Times of the operations, beside plain PyTorch and torch.compile; and of whole training steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import kernels
from bench.kernels.workloads import (
    AVERAGER_OPTIONS,
    DTYPE_BYTES,
    EXTRACTOR,
    IMAGE_SIZE,
    MINIBATCH,
    TapShape,
    averager_arguments,
    plain_averager,
    plain_backward,
    plain_forward,
    short,
    taps_of,
)
from bench.rows import Row, compare, environment, table
from bench.scenario import Scenario
from engine.comparison.moment_matching import _Matching
from kernels import reference
from kernels.layout import feature_rows


@dataclass(frozen=True)
class Timing:
    """One operation on one shape, and everyone who can do it; the first is ours.

    Attributes:
        calls: by name; each may be called again and again.
        floor_bytes: see `BytesRow`.
    """

    op: str
    shape: str
    dtype: torch.dtype
    calls: dict[str, Callable[[], object]]
    floor_bytes: int


def _relu_and_read(rows: Tensor) -> Tensor:
    """The least that one can do: ReLU in place and one sum over the images."""
    y = torch.relu(rows)
    rows.copy_(y)
    return y.float().sum(dim=0)


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for every shape by itself: never more general than its rival, never silently not compiled at all."""
    return torch.compile(  # type: ignore[call-overload]  # its stub lacks recompile_limit
        function, dynamic=False, fullgraph=True, recompile_limit=128
    )


def _verify(what: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        one, other = one.detach().double().cpu(), other.detach().double().cpu()
        error = float((one - other).norm() / other.norm())
        if not error <= tolerance:
            raise RuntimeError(f"{what}: wrong by {error:.1e}; a wrong result is not worth timing")


def timings_of_tap(tap: TapShape, dtype: torch.dtype, device: str) -> list[Timing]:
    """Forward and backward of one tap, everyone verified against float64.

    Raises RuntimeError if somebody computes something else.
    """
    torch.manual_seed(0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    ours = kernels.select("auto", torch.device(device), dtype)
    own_name = ours.__name__.removeprefix("kernels.")

    def draw() -> Tensor:
        return torch.randn(MINIBATCH, *tap.shape, device=device).to(dtype, memory_format=torch.channels_last)

    x, grad, residual = draw(), draw(), draw() if tap.residual else None
    mean, m2, mean_gradient, variance_gradient = (torch.randn(tap.features, device=device) for _ in range(4))
    # ∂L/∂mean and ∂L/∂variance are in the order of plain PyTorch's features, (C, H, W).
    order = torch.arange(tap.features, device=device).view(tap.shape).permute(1, 2, 0).flatten()
    exact_x = x.double().requires_grad_()
    exact = plain_forward(exact_x, None if residual is None else residual.double())
    statistics_gradient = (mean_gradient.double() / MINIBATCH, variance_gradient.double() / MINIBATCH)
    exact_gradient = plain_backward(exact_x, exact, (grad.double(), *statistics_gradient))
    exact_mean, exact_variance = exact[1].detach()[order], exact[2].detach()[order]
    b = 2 * statistics_gradient[1][order] / (MINIBATCH - 1)
    a = (statistics_gradient[0][order] / MINIBATCH - b * exact_mean).float()
    b = b.float()

    fused_forward = _fused(plain_forward)
    plain_x = x.clone().requires_grad_()
    outputs = {"plain PyTorch": plain_forward(plain_x, residual), "torch.compile": fused_forward(plain_x, residual)}
    gradients = (grad, statistics_gradient[0].float(), statistics_gradient[1].float())
    for name, (y, own_mean, own_variance) in outputs.items():
        _verify(name, (y, own_mean[order], own_variance[order]), (exact[0], exact_mean, exact_variance), tolerance)
        _verify(name, (plain_backward(plain_x, outputs[name], gradients),), (exact_gradient,), tolerance)
    backends: dict[str, ModuleType] = {f"gfmn, {own_name}": ours, "gfmn, reference": reference}
    for name, backend in backends.items():
        y, own_grad = x.clone(memory_format=torch.preserve_format), grad.clone(memory_format=torch.preserve_format)
        backend.relu_moments(y, mean, m2, 0, None, residual)
        backend.relu_moments_backward(own_grad, y, a, b)
        _verify(name, (y, mean, m2 / (MINIBATCH - 1)), (exact[0], exact_mean, exact_variance), tolerance)
        _verify(name, (own_grad,), (exact_gradient,), tolerance)

    # What is timed runs in place again and again: with coefficients of zero nothing grows.
    y, zero = x.relu(), torch.zeros_like(a)
    rows, least = feature_rows(y), _fused(_relu_and_read)
    least(rows)
    no_grad_x = x.clone(memory_format=torch.preserve_format)
    with torch.no_grad():
        fused_forward(no_grad_x, residual)
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    for name, backend in backends.items():
        forward[name] = partial(backend.relu_moments, y, mean, m2, 0, None, residual)
        backward[name] = partial(backend.relu_moments_backward, grad, y, zero, zero)
    forward["plain PyTorch"] = torch.no_grad()(partial(plain_forward, no_grad_x, residual))
    forward["torch.compile"] = torch.no_grad()(partial(fused_forward, no_grad_x, residual))
    for name, output in outputs.items():
        backward[name] = partial(plain_backward, plain_x, output, gradients)
    for calls in (forward, backward):
        calls["ReLU in place and one read, torch.compile"] = partial(least, rows)
    shape = "×".join(map(str, (MINIBATCH, *tap.shape))) + (", shortcut" if tap.residual else "")
    activation = MINIBATCH * tap.features * DTYPE_BYTES[dtype]
    return [
        Timing("relu_moments", shape, dtype, forward, (2 + tap.residual) * activation + 8 * tap.features),
        Timing("relu_moments_backward", shape, dtype, backward, 3 * activation + 8 * tap.features),
    ]


def timing_of_averager(features: int, device: str) -> Timing:
    """One step of AMA over all features, everyone verified against float64."""
    torch.manual_seed(0)
    args = averager_arguments(features, device)
    ours = kernels.select("auto", torch.device(device), torch.float32)
    own_name = ours.__name__.removeprefix("kernels.")
    backends: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
        f"gfmn, {own_name}": ours.averager_step,
        "plain PyTorch": plain_averager,
        "torch.compile": _fused(plain_averager),
    }

    def copied(dtype: torch.dtype | None = None) -> list[Any]:
        return [x.to(dtype if x.is_floating_point() else None, copy=True) if isinstance(x, Tensor) else x for x in args]

    exact = plain_averager(*copied(torch.float64), **AVERAGER_OPTIONS)
    for name, step in backends.items():
        _verify(name, step(*copied(), **AVERAGER_OPTIONS), exact, 1e-5)
    calls = {name: partial(step, *copied(), **AVERAGER_OPTIONS) for name, step in backends.items()}
    return Timing("averager_step, AMA", str(features), torch.float32, dict(calls), 4 * features * 18)


def measure(device: str, repetitions: int) -> list[Row]:
    """All operations: the kinds of taps of `EXTRACTOR`, in bfloat16 and float32, and the averager over all of them."""
    taps = taps_of(EXTRACTOR, IMAGE_SIZE)
    rows: list[Row] = []
    timings = [timing_of_averager(sum(tap.features for tap in taps), device)]
    for dtype in (torch.bfloat16, torch.float32):
        for tap in sorted(set(taps), key=lambda tap: (-tap.features, tap.residual)):
            timings += timings_of_tap(tap, dtype, device)
    for timing in timings:
        rows += compare(timing.op, timing.shape, short(timing.dtype), timing.calls, repetitions, timing.floor_bytes)
        print(f"{timing.op}, {timing.shape}, {short(timing.dtype)}", file=sys.stderr)
    return rows


def print_times(rows: Sequence[Row]) -> None:
    """The table."""
    headings = ("operation", "shape", "dtype", "backend", "p20, µs", "p50", "p80", "/ ours", "GB/s", "peak memory, kB")
    print(table(headings, [[
        row.op, row.shape, row.dtype, row.backend, f"{row.p20:.0f}", f"{row.p50:.0f}", f"{row.p80:.0f}",
        f"{row.relative:.2f}", f"{row.bytes_per_second / 1e9:.1f}", f"{row.peak_memory / 1e3:.0f}",
    ] for row in rows]))  # fmt: skip


@dataclass(frozen=True)
class StepRow:
    """Whole training steps, and what the criterion (moments, averager, coefficients) takes of them; seconds."""

    extractor: str
    minibatch: int
    dtype: str
    backend: str
    p20: float
    p50: float
    p80: float
    criterion_p50: float
    share: float
    environment: dict[str, Any] = field(default_factory=environment, repr=False)


def measure_steps(device: str, repetitions: int) -> list[StepRow]:
    """Training steps of `EXTRACTOR` with a DCGAN generator: both dtypes, by the fastest backend and by `reference`."""
    scenario = Scenario.build(EXTRACTOR, IMAGE_SIZE, MINIBATCH, device)
    return [
        _measure_step(scenario, backend, dtype, repetitions)
        for dtype in (torch.bfloat16, torch.float32)
        for backend in ("auto", "reference")
    ]


def _measure_step(scenario: Scenario, backend: str, dtype: torch.dtype, repetitions: int) -> StepRow:
    """Time inside the criterion's methods counts as its share."""
    device = scenario.device.type
    autocast = None if dtype == torch.float32 else dtype
    step = scenario.trainer(scenario.ours(autocast, kernels=backend), autocast)
    inside = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal inside
            begun = _now(device)
            result = method(*args)
            inside += _now(device) - begun
            return result

        return call

    names = ("collect", "finish", "scale", "gradient")
    whole, shares, criterion = [], [], []
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(_Matching, name, timed(getattr(_Matching, name))))
        for n in range(repetitions + 2):
            inside, begun = 0.0, _now(device)
            step()
            if n >= 2:
                whole.append(_now(device) - begun)
                criterion.append(inside)
                shares.append(inside / whole[-1])
    p20, p50, p80 = np.percentile(whole, (20, 50, 80)).tolist()
    share, inner = float(np.median(shares)), float(np.median(criterion))
    return StepRow(scenario.name, scenario.minibatch, short(dtype), backend, p20, p50, p80, inner, share)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def print_steps(rows: Sequence[StepRow]) -> None:
    """The table."""
    headings = ("extractor", "minibatch", "dtype", "kernels", "step p20, s", "p50", "p80", "criterion, s", "share")
    print(table(headings, [[
        row.extractor, row.minibatch, row.dtype, row.backend, f"{row.p20:.2f}", f"{row.p50:.2f}", f"{row.p80:.2f}",
        f"{row.criterion_p50:.3f}", f"{row.share:.1%}",
    ] for row in rows]))  # fmt: skip
