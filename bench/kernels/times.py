"""Times of the operations, beside plain PyTorch and torch.compile; and of whole training steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

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
from bench.rows import Row, cold_seconds, interleaved, peak_memory, percentiles, seconds, synchronize
from bench.scenario import Problem, Scenario, engine_step
from kernels import reference
from kernels.layout import feature_rows

OPERATIONS = ("relu_moments", "relu_moments_backward", "averager_step")


@dataclass(frozen=True)
class OperationRow(Row):
    """One operation on one shape by one backend.

    Attributes:
        op: the operation.
        backend: who did it.
        shape, dtype: of the activations (or buffers) it was done to.
        p20, p50, p80: µs per call.
        relative: p50 divided by that of the first backend of the same comparison.
        bytes_per_second: bytes that the operation has to move at least, by p50; 0 if nobody counted them.
        peak_memory: bytes allocated during one call, at most at the same time.
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

    def cells(self) -> dict[str, object]:
        """Times in µs, the rate in GB/s, memory in kB."""
        return {
            "operation": self.op,
            "shape": self.shape,
            "dtype": self.dtype,
            "backend": self.backend,
            "p20, µs": f"{self.p20:.0f}",
            "p50": f"{self.p50:.0f}",
            "p80": f"{self.p80:.0f}",
            "/ ours": f"{self.relative:.2f}",
            "GB/s": f"{self.bytes_per_second / 1e9:.1f}",
            "peak memory, kB": f"{self.peak_memory / 1e3:.0f}",
        }


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
    floor_bytes: int = 0

    def rows(self, repetitions: int) -> list[OperationRow]:
        """Time all calls, each from cold caches, `repetitions` times.

        Every call has run before (compiled), and was found to be correct: nothing is checked here.
        """
        times = interleaved(self.calls, repetitions, cold_seconds)
        micros = {backend: percentiles([1e6 * taken for taken in found]) for backend, found in times.items()}
        first = micros[next(iter(self.calls))][1]
        return [
            OperationRow(
                op=self.op,
                backend=backend,
                shape=self.shape,
                dtype=short(self.dtype),
                p20=p20,
                p50=p50,
                p80=p80,
                relative=p50 / first,
                bytes_per_second=self.floor_bytes / p50 * 1e6,
                peak_memory=peak_memory(self.calls[backend]),
            )
            for backend, (p20, p50, p80) in micros.items()
        ]


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


def verify(what: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """RuntimeError unless ‖found − expected‖ ≤ tolerance · ‖expected‖ for every pair of tensors."""
    for one, other in zip(found, expected, strict=True):
        one, other = one.detach().double().cpu(), other.detach().double().cpu()
        error = float((one - other).norm() / other.norm())
        if not error <= tolerance:
            raise RuntimeError(f"{what}: wrong by {error:.1e}; a wrong result is not worth timing")


def _fastest(device: str, dtype: torch.dtype) -> tuple[str, ModuleType]:
    """The backend that `kernels="auto"` chooses, and its name among the rows."""
    backend = kernels.select("auto", torch.device(device), dtype)
    return f"gfmn, {backend.__name__.removeprefix('kernels.')}", backend


class _TapInputs:
    """Random inputs of one tap, and what float64 autograd makes of them.

    Attributes:
        x, grad, residual: activations before the tap [N, C, H, W]; ∂L/∂y; the shortcut, or None.
        gradients: ∂L/∂(y, mean, variance), as plain PyTorch takes them: features in the order (C, H, W).
        a, b: the coefficients [F] that say the same to our kernels: features in memory order, (H, W, C).
        exact: (y, mean, variance) in float64, features in memory order.
        exact_gradient: ∂L/∂x in float64.
    """

    def __init__(self, tap: TapShape, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        self.tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]

        def draw() -> Tensor:
            return torch.randn(MINIBATCH, *tap.shape, device=device).to(dtype, memory_format=torch.channels_last)

        self.x, self.grad, self.residual = draw(), draw(), draw() if tap.residual else None
        self.mean, self.m2, for_mean, for_variance = (torch.randn(tap.features, device=device) for _ in range(4))
        for_mean, for_variance = for_mean.double() / MINIBATCH, for_variance.double() / MINIBATCH
        self.gradients = (self.grad, for_mean.float(), for_variance.float())
        self.order = torch.arange(tap.features, device=device).view(tap.shape).permute(1, 2, 0).flatten()
        exact_x = self.x.double().requires_grad_()
        outputs = plain_forward(exact_x, None if self.residual is None else self.residual.double())
        self.exact_gradient = plain_backward(exact_x, outputs, (self.grad.double(), for_mean, for_variance))
        self.exact = self.in_memory_order(outputs)
        b = 2 * for_variance[self.order] / (MINIBATCH - 1)
        self.a, self.b = (for_mean[self.order] / MINIBATCH - b * self.exact[1]).float(), b.float()

    def in_memory_order(self, outputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, variance = outputs
        return y.detach(), mean.detach()[self.order], variance.detach()[self.order]

    def verify_plain(self, name: str, forward: Callable[..., Any]) -> Callable[[], Tensor]:
        """Check somebody's forward and, by autograd, backward; returns the backward, to be called again and again."""
        x = self.x.clone().requires_grad_()
        outputs = forward(x, self.residual)
        verify(name, self.in_memory_order(outputs), self.exact, self.tolerance)
        backward = partial(plain_backward, x, outputs, self.gradients)
        verify(name, (backward(),), (self.exact_gradient,), self.tolerance)
        return backward

    def verify_backend(self, name: str, backend: ModuleType) -> None:
        """Check a backend of ours."""
        y, grad = (tensor.clone(memory_format=torch.preserve_format) for tensor in (self.x, self.grad))
        backend.relu_moments(y, self.mean, self.m2, 0, None, self.residual)
        backend.relu_moments_backward(grad, y, self.a, self.b)
        verify(name, (y, self.mean, self.m2 / (MINIBATCH - 1)), self.exact, self.tolerance)
        verify(name, (grad,), (self.exact_gradient,), self.tolerance)


def timings_of_tap(tap: TapShape, dtype: torch.dtype, device: str) -> list[Timing]:
    """Forward and backward of one tap, everyone verified against float64.

    Raises RuntimeError if somebody computes something else.
    """
    inputs = _TapInputs(tap, dtype, device)
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    # What is timed runs in place again and again: with coefficients of zero nothing grows.
    y, zero = inputs.x.relu(), torch.zeros_like(inputs.a)
    for name, backend in dict((_fastest(device, dtype), ("gfmn, reference", reference))).items():
        inputs.verify_backend(name, backend)
        forward[name] = partial(backend.relu_moments, y, inputs.mean, inputs.m2, 0, None, inputs.residual)
        backward[name] = partial(backend.relu_moments_backward, inputs.grad, y, zero, zero)
    x = inputs.x.clone(memory_format=torch.preserve_format)
    for name, function in (("plain PyTorch", plain_forward), ("torch.compile", _fused(plain_forward))):
        backward[name] = inputs.verify_plain(name, function)
        forward[name] = torch.no_grad()(partial(function, x, inputs.residual))
        forward[name]()  # compiles once more, without a graph for backward
    least = partial(_fused(_relu_and_read), feature_rows(y))
    least()
    for calls in (forward, backward):
        calls["ReLU in place and one read, torch.compile"] = least
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
    own_name, ours = _fastest(device, torch.float32)
    backends: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
        own_name: ours.averager_step,
        "plain PyTorch": plain_averager,
        "torch.compile": _fused(plain_averager),
    }

    def copied(dtype: torch.dtype | None = None) -> list[Any]:
        return [x.to(dtype if x.is_floating_point() else None, copy=True) if isinstance(x, Tensor) else x for x in args]

    exact = plain_averager(*copied(torch.float64), **AVERAGER_OPTIONS)
    for name, step in backends.items():
        verify(name, step(*copied(), **AVERAGER_OPTIONS), exact, 1e-5)
    calls = {name: partial(step, *copied(), **AVERAGER_OPTIONS) for name, step in backends.items()}
    return Timing("averager_step, AMA", str(features), torch.float32, dict(calls), 4 * features * 18)


def measure_operations(device: str, repetitions: int) -> list[OperationRow]:
    """All operations: the kinds of taps of `EXTRACTOR`, in bfloat16 and float32, and the averager over all of them."""
    taps = taps_of(EXTRACTOR, IMAGE_SIZE)
    rows: list[OperationRow] = []
    timings = [timing_of_averager(sum(tap.features for tap in taps), device)]
    for dtype in (torch.bfloat16, torch.float32):
        for tap in sorted(set(taps), key=lambda tap: (-tap.features, tap.residual)):
            timings += timings_of_tap(tap, dtype, device)
    for timing in timings:
        rows += timing.rows(repetitions)
        print(f"{timing.op}, {timing.shape}, {short(timing.dtype)}", file=sys.stderr)
    return rows


@dataclass(frozen=True)
class CriterionRow(Row):
    """Whole training steps, and what the three operations take of them: moments, averager, ∂L/∂y.

    Attributes:
        backend: of the operations.
        p20, p50, p80: seconds a step.
        criterion_p50: median seconds inside the operations.
        share: median over the steps of their part of the step.
    """

    extractor: str
    minibatch: int
    dtype: str
    backend: str
    p20: float
    p50: float
    p80: float
    criterion_p50: float
    share: float

    def cells(self) -> dict[str, object]:
        """Seconds, and the share in percent."""
        return {
            "extractor": self.extractor,
            "minibatch": self.minibatch,
            "dtype": self.dtype,
            "kernels": self.backend,
            "step p20, s": f"{self.p20:.2f}",
            "p50": f"{self.p50:.2f}",
            "p80": f"{self.p80:.2f}",
            "criterion, s": f"{self.criterion_p50:.3f}",
            "share": f"{self.share:.1%}",
        }


def measure_steps(device: str, repetitions: int) -> list[CriterionRow]:
    """Training steps of `EXTRACTOR` with a DCGAN generator: both dtypes, by the fastest backend and by `reference`."""
    scenario = Scenario.calibrated(Problem(EXTRACTOR, IMAGE_SIZE), device)
    return [
        measure_step(scenario, MINIBATCH, backend, dtype, repetitions)
        for dtype in (torch.bfloat16, torch.float32)
        for backend in ("auto", "reference")
    ]


@dataclass
class Clocked:
    """The operations of a backend, with a clock around them.

    Attributes:
        functions: stand in for the backend's module.
        inside: seconds spent in them so far. The clock waits for the GPU before and after each.
    """

    backend: ModuleType
    inside: float = 0.0
    functions: SimpleNamespace = field(init=False)

    def __post_init__(self) -> None:
        timed = {name: self._timed(getattr(self.backend, name)) for name in OPERATIONS}
        self.functions = SimpleNamespace(__name__=self.backend.__name__, **timed)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            synchronize()
            begun = time.perf_counter()
            result = function(*args, **options)
            synchronize()
            self.inside += time.perf_counter() - begun
            return result

        return call


def measure_step(
    scenario: Scenario, minibatch: int, backend: str, dtype: torch.dtype, repetitions: int
) -> CriterionRow:
    """`repetitions` training steps after two untimed ones."""
    parts = scenario.parts(minibatch, None if dtype == torch.float32 else dtype, kernels=backend)
    clocked = Clocked(parts.objective.kernels)
    parts.objective.feature_pass.kernels = clocked.functions  # type: ignore[assignment]  # has the same functions
    step = engine_step(parts)
    whole, criterion = [], []
    for n in range(repetitions + 2):
        clocked.inside = 0.0
        taken = seconds(step)
        if n >= 2:
            whole.append(taken)
            criterion.append(clocked.inside)
    shares = [inner / taken for inner, taken in zip(criterion, whole, strict=True)]
    return CriterionRow(
        scenario.problem.extractor, minibatch, short(dtype), backend, *percentiles(whole), float(np.median(criterion)),
        float(np.median(shares)),
    )  # fmt: skip
