"""Times of the operations, beside plain PyTorch and torch.compile.

On CUDA an operation's time is that of its kernels: a graph of many calls, on buffers that are larger in all than the
cache, is replayed between two events. On a CPU it is the wall clock's, from cold caches.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import kernels
from bench.cuda import Cuda, cuda_of, replay_of, replay_seconds
from bench.kernels.workloads import (
    AVERAGER_OPTIONS,
    DTYPE_BYTES,
    EXTRACTOR,
    IMAGE_SIZE,
    MINIBATCH,
    PAIRS,
    WIDTHS,
    TapShape,
    averager_arguments,
    plain_averager,
    plain_backward,
    plain_forward,
    plain_pairwise,
    short,
    taps_of,
)
from bench.rows import FLUSHED_BYTES, Row, cold_seconds, environment, interleaved, peak_memory, percentiles
from kernels import reference
from kernels.layout import feature_rows

# A graph of so many calls runs much longer than its launch takes; so many buffers at most for the smallest taps.
GRAPHED_CALLS, MOST_COPIES = 20, 256

OPERATIONS = ("averager", "pairwise", "taps")

Calls = dict[str, Callable[[], object]]


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
        again: makes the same calls on buffers of their own, in the same order.
        floor_bytes: see `BytesRow`.
    """

    op: str
    shape: str
    dtype: torch.dtype
    calls: Calls
    again: Callable[[], Calls]
    floor_bytes: int = 0

    def rows(self, repetitions: int, device: str, cuda: Cuda | None) -> list[OperationRow]:
        """Time all calls, each from cold caches, `repetitions` times.

        Every call has run before (compiled), and was found to be correct: nothing is checked here.
        """
        if cuda is None:
            times = interleaved(self.calls, repetitions, partial(cold_seconds, device=device))
        else:
            times = self._replayed(repetitions, cuda)
        micros = {backend: percentiles([1e6 * taken for taken in found]) for backend, found in times.items()}
        first = next(iter(micros.values()))[1]
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
                peak_memory=peak_memory(self.calls[backend], device),
                environment=environment(device),
            )
            for backend, (p20, p50, p80) in micros.items()
        ]

    def _replayed(self, repetitions: int, cuda: Cuda) -> dict[str, list[float]]:
        """Seconds a call, of graphs of at least `GRAPHED_CALLS`; who cannot be captured is left out, and told."""
        copies = min(MOST_COPIES, -(-FLUSHED_BYTES // max(1, self.floor_bytes)) + 1)
        sets = [self.calls, *(self.again() for _ in range(copies - 1))]
        graphs: dict[str, tuple[Callable[[], None], int]] = {}
        for backend in self.calls:
            try:
                graphs[backend] = replay_of([calls[backend] for calls in sets], GRAPHED_CALLS, cuda)
            except RuntimeError as error:
                print(f"{self.op}, {backend}: left out, no graph of it can be captured: {error}", file=sys.stderr)
        replays = {backend: replay for backend, (replay, _) in graphs.items()}
        times = interleaved(replays, repetitions, partial(replay_seconds, cuda=cuda), warmup=1)
        return {backend: [taken / graphs[backend][1] for taken in found] for backend, found in times.items()}


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

    def verify_plain(self, name: str, forward: Callable[..., Any]) -> None:
        """Check somebody's forward and, by autograd, backward."""
        x = self.x.clone().requires_grad_()
        outputs = forward(x, self.residual)
        verify(name, self.in_memory_order(outputs), self.exact, self.tolerance)
        verify(name, (plain_backward(x, outputs, self.gradients),), (self.exact_gradient,), self.tolerance)

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
    backends = dict((_fastest(device, dtype), ("gfmn, reference", reference)))
    plain = {"plain PyTorch": plain_forward, "torch.compile": _fused(plain_forward)}
    least = _fused(_relu_and_read)
    for name, backend in backends.items():
        inputs.verify_backend(name, backend)
    for name, function in plain.items():
        inputs.verify_plain(name, function)

    def calls() -> tuple[Calls, Calls]:
        """Of both operations, on buffers of their own. What runs in place again and again grows nothing: a = b = 0."""
        forward: Calls = {}
        backward: Calls = {}
        y, x, grad = inputs.x.relu(), inputs.x.clone(), inputs.grad.clone()
        residual = None if inputs.residual is None else inputs.residual.clone()
        mean, m2, zero = inputs.mean.clone(), inputs.m2.clone(), torch.zeros_like(inputs.a)
        for name, backend in backends.items():
            forward[name] = partial(backend.relu_moments, y, mean, m2, 0, None, residual)
            backward[name] = partial(backend.relu_moments_backward, grad, y, zero, zero)
        for name, function in plain.items():
            leaf = x.clone().requires_grad_()
            gradients = (grad, inputs.gradients[1].clone(), inputs.gradients[2].clone())
            backward[name] = partial(plain_backward, leaf, function(leaf, residual), gradients)
            forward[name] = torch.no_grad()(partial(function, x, residual))
            forward[name]()  # compiles once more, without a graph for backward
        for both in (forward, backward):
            both["ReLU in place and one read, torch.compile"] = partial(least, feature_rows(y))
        least(feature_rows(y))
        return forward, backward

    forward, backward = calls()
    shape = "×".join(map(str, (MINIBATCH, *tap.shape))) + (", shortcut" if tap.residual else "")
    activation = MINIBATCH * tap.features * DTYPE_BYTES[dtype]
    forward_floor, backward_floor = (
        (2 + tap.residual) * activation + 8 * tap.features,
        3 * activation + 8 * tap.features,
    )
    return [
        Timing("relu_moments", shape, dtype, forward, lambda: calls()[0], forward_floor),
        Timing("relu_moments_backward", shape, dtype, backward, lambda: calls()[1], backward_floor),
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

    def calls() -> Calls:
        return {name: partial(step, *copied(), **AVERAGER_OPTIONS) for name, step in backends.items()}

    return Timing("averager_step, AMA", str(features), torch.float32, calls(), calls, 4 * features * 18)


def timing_of_pairs(count: int, others: int, features: int, device: str) -> Timing:
    """Sums of a Gaussian mixture over all pairs of rows, and their gradient, everyone verified against float64."""
    torch.manual_seed(0)
    x, y = torch.randn(count, features, device=device), torch.randn(others, features, device=device)
    own_name, ours = _fastest(device, torch.float32)

    def calls_on(x: Tensor, y: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
        return {
            own_name: partial(ours.pairwise_sums, x, y, "gaussian", WIDTHS),
            "plain PyTorch": partial(plain_pairwise, x, y, WIDTHS),
        }

    exact = reference.pairwise_sums(x.double(), y.double(), "gaussian", WIDTHS)
    for name, call in calls_on(x, y).items():
        verify(name, call(), exact, 1e-4)

    def calls() -> Calls:
        return dict(calls_on(x.clone(), y.clone()))

    floor = 4 * features * (2 * count + others) + 8 * count
    shape = "×".join(map(str, (count, others, features)))
    return Timing("pairwise_sums, Gaussian mixture", shape, torch.float32, calls(), calls, floor)


def _distinct(taps: Sequence[TapShape]) -> list[TapShape]:
    """One tap of each shape, with and without a shortcut, the largest first."""
    kinds = {(tap.shape, tap.residual): tap for tap in taps}
    return sorted(kinds.values(), key=lambda tap: (-tap.features, tap.residual))


def measure_operations(
    device: str,
    repetitions: int,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    operations: Sequence[str] = OPERATIONS,
) -> Iterator[OperationRow]:
    """The averager over all taps of `EXTRACTOR`, sums over `PAIRS`, and the kinds of taps in every dtype."""
    taps = taps_of(EXTRACTOR, IMAGE_SIZE)
    cuda = cuda_of(device)
    # A backward pass can only be captured on the stream of its forward pass.
    with contextlib.nullcontext() if cuda is None else cuda.on_stream():
        if "averager" in operations:
            yield from timing_of_averager(sum(tap.features for tap in taps), device).rows(repetitions, device, cuda)
        if "pairwise" in operations:
            yield from timing_of_pairs(*PAIRS, device).rows(repetitions, device, cuda)
        for dtype in dtypes if "taps" in operations else ():
            for tap in _distinct(taps):
                for timing in timings_of_tap(tap, dtype, device):
                    yield from timing.rows(repetitions, device, cuda)
                    print(f"{timing.op}, {timing.shape}, {short(timing.dtype)}", file=sys.stderr)
