"""Bytes that the operations move: ours lane by lane in the interpreter, others' from their operators or graphs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.kernels.workloads import (
    AVERAGER_OPTIONS,
    DTYPE_BYTES,
    MINIBATCH,
    TapShape,
    averager_arguments,
    plain_averager,
    plain_backward,
    plain_forward,
    triton_backend,
)
from bench.rows import Row, print_rows
from kernels.layout import feature_rows


@dataclass(frozen=True)
class BytesRow(Row):
    """Bytes that one operation moves over all taps of a minibatch.

    Attributes:
        ours: counted in the kernels, of which `partial` are sums between two stages; and what happens before them:
            biases that a convolution adds in a kernel of its own, which reads and writes all that comes out of it, and
            gradients of several readers that are summed, or of none, which is made of zeros.
        floor: every activation and gradient read once and written where it changes, values per feature and biases once.
        eager, compiled: the plain PyTorch formula, run operator by operator and fused by torch.compile. The first has a
            kernel of its own for every bias and every sum of two gradients; the second does both on the way.
    """

    op: str
    ours: int
    partial: int
    floor: int
    eager: int
    compiled: int

    def cells(self) -> dict[str, object]:
        """Megabytes, and the ratios to the floor."""
        return {
            "operation": self.op,
            "ours, MB": f"{self.ours / 1e6:.1f}",
            "partial sums": f"{self.partial / 1e6:.2f}",
            "floor": f"{self.floor / 1e6:.1f}",
            "ours / floor": f"{self.ours / self.floor:.4f}",
            "plain PyTorch": f"{self.eager / 1e6:.1f} ({self.eager / self.floor:.1f}×)",
            "torch.compile": f"{self.compiled / 1e6:.1f} ({self.compiled / self.floor:.1f}×)",
        }


COLUMNS = ("ours", "partial", "floor", "eager", "compiled")


class AccessCounter:
    """Context that counts, in Triton's interpreter, the bytes of every lane that is not masked off.

    Attributes:
        moved: bytes by what they belong to, one of the `named` tensors or "partial" (the backend's own scratch).
    """

    def __init__(self, **named: Tensor):
        self.ranges = {
            name: (tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes())
            for name, tensor in named.items()
        }
        self.moved = {**dict.fromkeys(named, 0), "partial": 0}

    def __enter__(self) -> AccessCounter:
        from triton.runtime import interpreter

        self._builder = type(interpreter.interpreter_builder)
        self._load, self._store = self._builder.create_masked_load, self._builder.create_masked_store
        counter = self

        # Unmasked accesses go through these two as well, with a mask of ones.
        def load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            counter._count(pointers, mask)
            return counter._load(builder, pointers, mask, *rest)

        def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            counter._count(pointers, mask)
            return counter._store(builder, pointers, value, mask, *rest)

        self._builder.create_masked_load, self._builder.create_masked_store = load, store
        return self

    def __exit__(self, *_: object) -> None:
        self._builder.create_masked_load, self._builder.create_masked_store = self._load, self._store

    def _count(self, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if not addresses.size:
            return
        owner = next(
            (name for name, (begin, end) in self.ranges.items() if begin <= int(addresses[0]) < end), "partial"
        )
        self.moved[owner] += addresses.size * (pointers.get_element_ty().primitive_bitwidth // 8)


class _OperatorBytes(TorchDispatchMode):
    """Adds up the inputs and outputs of every operator that touches memory."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.total += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        return result


def _eager_bytes(tap: TapShape, dtype: torch.dtype) -> tuple[int, int]:
    """Of `plain_forward` and `plain_backward`, on tensors without data."""
    x, residual, y_gradient = (
        torch.empty(MINIBATCH, *tap.shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
        for _ in range(3)
    )
    x.requires_grad_()
    per_feature = torch.empty(tap.features, device="meta")
    with _OperatorBytes() as forward:
        outputs = plain_forward(x, residual if tap.residual else None)
    with _OperatorBytes() as backward:
        plain_backward(x, outputs, (y_gradient, per_feature, per_feature))
    return forward.total, backward.total


class _InductorBytes:
    """Context that adds up what Inductor reports of every graph that it compiles."""

    def __enter__(self) -> _InductorBytes:
        from torch._inductor import config

        self.total = 0
        self._stack = ExitStack()
        # Inductor only counts for a logger that listens.
        self._stack.enter_context(patch("torch._inductor.compile_fx.inductor_metrics_log", self))
        self._stack.enter_context(config.patch(force_disable_caches=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def isEnabledFor(self, level: int) -> bool:
        """Inductor asks its logger whether it listens: it does."""
        return True

    def info(self, message: str, graph: dict[str, Any]) -> None:
        """What Inductor calls with its count of a compiled graph."""
        self.total += graph["num_bytes_accessed"]


def _compiled_bytes(tap: TapShape, dtype: torch.dtype) -> tuple[int, int]:
    """Of torch.compile's versions of `plain_forward` and `plain_backward`."""
    torch._dynamo.reset()
    x, y_gradient, residual = (
        torch.zeros(MINIBATCH, *tap.shape, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(3)
    )
    x.requires_grad_()
    per_feature = torch.zeros(tap.features)
    with _InductorBytes() as forward:
        outputs = torch.compile(plain_forward, dynamic=False)(x, residual if tap.residual else None)
    with _InductorBytes() as backward:
        plain_backward(x, outputs, (y_gradient, per_feature, per_feature))
    return forward.total, backward.total


def _our_bytes(tap: TapShape, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Of the Triton kernels, by tensor, for one tap; and a look at the result."""
    ops = triton_backend()
    x, grad, residual = (
        torch.randn(MINIBATCH, *tap.shape).to(dtype, memory_format=torch.channels_last) for _ in range(3)
    )
    mean, m2, a, b = (torch.zeros(tap.features) for _ in range(4))
    bias = torch.randn(tap.shape[0]).to(dtype)
    added = x.float() + tap.bias * bias.float().view(-1, 1, 1) + tap.residual * residual.float()
    expected = feature_rows(torch.relu(added)).mean(0)
    with AccessCounter(x=x, residual=residual, bias=bias, mean=mean, m2=m2) as forward:
        ops.relu_moments(x, mean, m2, 0, bias if tap.bias else None, residual if tap.residual else None)
    if not torch.allclose(mean, expected, atol=2e-2):  # the interpreter truncates to bfloat16
        raise RuntimeError(f"relu_moments: wrong means for {tap}")
    with AccessCounter(grad=grad, y=x, a=a, b=b, shortcut=residual) as backward:
        ops.relu_moments_backward(grad, x, a, b, shortcut=residual if tap.readers > 1 else None)
    return forward.moved, backward.moved


def count_bytes(taps: Sequence[TapShape], dtype: torch.dtype) -> list[BytesRow]:
    """Bytes of the three operations over `taps`, for a minibatch of `MINIBATCH`; each kind of tap is counted once."""
    if not triton_backend().INTERPRETED:
        raise RuntimeError("--bytes needs Triton's interpreter: set TRITON_INTERPRET=1")
    activation, per_feature = MINIBATCH * DTYPE_BYTES[dtype], 4
    ours, partial, floor, eager, fused = (np.zeros(2, dtype=np.int64) for _ in range(5))
    largest = max(taps, key=lambda tap: tap.features)
    compiled_per_feature = {
        residual: np.array(_compiled_bytes(TapShape(largest.shape, residual), dtype)) / largest.features
        for residual in {tap.residual for tap in taps}
    }
    for tap in sorted(set(taps), key=lambda tap: tap.features):
        times = taps.count(tap)
        moved = _our_bytes(tap, dtype)
        ours += times * np.array([sum(counts.values()) for counts in moved])
        partial += times * np.array([counts["partial"] for counts in moved])
        forward_floor = tap.features * ((2 + tap.residual) * activation + 2 * per_feature)
        forward_floor += tap.bias * tap.shape[0] * DTYPE_BYTES[dtype]
        backward_floor = tap.features * ((2 + tap.readers) * activation + 2 * per_feature)
        floor += times * np.array([forward_floor, backward_floor])
        eager += times * np.array(_eager_bytes(tap, dtype))
        fused += times * np.round(compiled_per_feature[tap.residual] * tap.features).astype(np.int64)
        # A sum of two gradients in a kernel of its own; the formula has one gradient, which was counted.
        more = (tap.readers - 1) * tap.features * activation
        eager[1] += times * 3 * more
        fused[1] += times * more
        kernels_before = {0: 1}.get(tap.readers, 3 * max(tap.readers - 2, 0))
        ours[1] += times * kernels_before * tap.features * activation
    # A bias that a convolution adds in a kernel of its own: all that comes out of it is read and written.
    eager[0] += 2 * activation * sum(tap.biased for tap in taps)
    ours[0] += 2 * activation * sum(tap.biased_before for tap in taps)
    rows = [
        BytesRow(op, int(ours[n]), int(partial[n]), int(floor[n]), int(eager[n]), int(fused[n]))
        for n, op in enumerate(("relu_moments", "relu_moments_backward"))
    ]
    return [*rows, _averager_bytes(sum(tap.features for tap in taps))]


def _averager_bytes(features: int) -> BytesRow:
    args = averager_arguments(features, "cpu")
    names = ("mean", "m2", "count", "target_mean", "target_variance", "v", "m", "u", "step")
    named = {name: value for name, value in zip(names, args, strict=True) if isinstance(value, Tensor)}
    with AccessCounter(**named) as counter:
        *_, sums = triton_backend().averager_step(*args, **AVERAGER_OPTIONS)
    with _OperatorBytes() as eager:
        plain_averager(*averager_arguments(features, "meta"), **AVERAGER_OPTIONS)
    torch._dynamo.reset()
    with _InductorBytes() as fused:
        torch.compile(plain_averager, dynamic=False)(*args, **AVERAGER_OPTIONS)
    # Four vectors in; v, m, u in and out for means and variances; a and b out; six sums and the step.
    floor = 4 * features * (4 + 12 + 2) + 6 * 8 + 2 * 8
    total = sum(counter.moved.values())
    results = 4 * 2 * features + sums.numel() * 8
    return BytesRow("averager_step", total, counter.moved["partial"] - results, floor, eager.total, fused.total)


def print_bytes(rows: Sequence[BytesRow]) -> None:
    """Print the operations, and the sums of their columns."""
    columns = {name: sum(getattr(row, name) for row in rows) for name in COLUMNS}
    print_rows([*rows, BytesRow("all", **columns)])
