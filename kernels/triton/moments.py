"""Activation and moments, their gradient, and the moments of a dataset, in Triton.

Both passes over the activations see a tap as rows [N, F] in memory order, F contiguous across lanes. A program owns
`BLOCK_F` features and walks down its rows tile by tile, every thread moving 16 bytes at a time, so that all sums over
images stay inside one program. A tap that is too small to fill the device that way (a few thousand features) is split
over the rows too; each split leaves its sums in a scratch buffer, and a second kernel adds them in order: no atomics,
the same bits every time.

A dataset's moments come from the same kernels: with float64 buffers all sums are in float64, and the activations are
computed as they are in training.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import feature_rows, is_channels_last
from kernels.operators import operator
from kernels.triton import launching
from kernels.triton.launching import NUM_WARPS, RUNTIME_SIZES

# Features of a program of the merge, whose float64 variant holds twice as much.
BLOCK_MERGE = 512


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    # Comparisons with NaN are false, so a NaN passes and reaches the loss.
    if ACTIVATION == "relu":
        value = tl.where(value < 0.0, 0.0, value)
    elif ACTIVATION == "relu6":
        value = tl.where(value < 0.0, 0.0, tl.where(value > 6.0, 6.0, value))
    return value


@triton.jit
def _widen(value, dtype: tl.constexpr):
    """To `dtype`; 16-bit values by way of float32, which loses nothing (the interpreter knows no other way)."""
    if value.dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def _narrow(value, dtype: tl.constexpr):
    """To `dtype`, the way back of `_widen`."""
    if dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def _load(pointer, mask, dtype: tl.constexpr):
    return _widen(tl.load(pointer, mask=mask, other=0.0), dtype)


@triton.jit
def _activate_tile(
    x_ptr, residual_ptr, bias, row, last, feature, features,
    dtype: tl.constexpr, ACTIVATION: tl.constexpr, CHANGES: tl.constexpr,
):  # fmt: skip
    """Read a tile of x once, overwrite it with y if that `CHANGES` it; y as stored, in `dtype`, and the tile's mask.

    y is computed in the dtype of `bias`: what is stored does not depend on the buffers that it is summed into.
    """
    mask = (row < last)[:, None] & (feature < features)[None, :]
    offset = row.to(tl.int64)[:, None] * features + feature[None, :]
    if not CHANGES:
        return _load(x_ptr + offset, mask, dtype), mask
    value = _load(x_ptr + offset, mask, bias.dtype)
    if residual_ptr is not None:
        value += _load(residual_ptr + offset, mask, bias.dtype)
    value += bias[
        None, :
    ]  # last: added first it stays in registers longer, and unaligned float64 sums spilled on sm_90
    y = _narrow(_activate(value, ACTIVATION), x_ptr.dtype.element_ty)
    tl.store(x_ptr + offset, y, mask=mask)
    return _widen(y, dtype), mask


@triton.jit
def _merge(mean_ptr, m2_ptr, feature, inside, count, arriving, pilot, offset, m2):
    """Chan, Golub, LeVeque 1979: `arriving` images of mean pilot + offset join `count` images of mean pilot."""
    before = count.to(pilot.dtype)
    share = arriving / (before + arriving)
    earlier = tl.load(m2_ptr + feature, mask=inside & (count > 0), other=0.0)
    tl.store(m2_ptr + feature, earlier + m2 + offset * offset * (before * share), mask=inside)
    tl.store(mean_ptr + feature, pilot + offset * share, mask=inside)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def relu_moments_kernel(
    x_ptr,  # [rows, features], memory order: x on entry, y on return
    bias_ptr,  # [channels] or None
    residual_ptr,  # [rows, features], laid out as x, or None
    mean_ptr,  # [features] float32, or float64 for float64 sums: of the `count` images before, then of all
    m2_ptr,  # [features], as mean
    partial_ptr,  # [splits, 2, features], as mean, or None: sums around the first row of each split
    rows,
    features,
    channels,
    inner,  # neighbours in memory that share a channel: 1 for channels_last, H·W for contiguous
    count,
    rows_per_split,
    ACTIVATION: tl.constexpr,
    CHANGES: tl.constexpr,  # whether y can differ from x
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """y in place, and the sums of y − pilot and (y − pilot)² over this program's rows.

    The pilot is the running mean, or the first row of the split while nothing has been merged: sums around a value
    among the data don't cancel as raw sums do.
    """
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    feature = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = feature < features
    arithmetic: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    bias = tl.zeros([BLOCK_F], arithmetic)
    if bias_ptr is not None:
        bias += _load(bias_ptr + (feature // inner) % channels, inside, arithmetic)
    first = tl.program_id(1) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)

    row = first + tl.arange(0, BLOCK_N)
    y, mask = _activate_tile(x_ptr, residual_ptr, bias, row, last, feature, features, dtype, ACTIVATION, CHANGES)
    # From registers: another warp may already have overwritten the first row in memory.
    first_row = tl.sum(tl.where((row == first)[:, None], y, 0.0), axis=0)
    running = tl.load(mean_ptr + feature, mask=inside & (count > 0), other=0.0)
    pilot = tl.where(count > 0, running, first_row)
    centred = tl.where(mask, y - pilot[None, :], 0.0)
    sums = centred
    squares = centred * centred
    for start in range(first + BLOCK_N, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        y, mask = _activate_tile(x_ptr, residual_ptr, bias, row, last, feature, features, dtype, ACTIVATION, CHANGES)
        centred = tl.where(mask, y - pilot[None, :], 0.0)
        sums += centred
        squares += centred * centred
    sums = tl.sum(sums, axis=0)
    squares = tl.sum(squares, axis=0)

    if partial_ptr is None:
        arriving = (last - first).to(dtype)
        offset = sums / arriving
        _merge(mean_ptr, m2_ptr, feature, inside, count, arriving, pilot, offset, squares - sums * offset)
    else:
        partial = partial_ptr + tl.program_id(1).to(tl.int64) * 2 * features + feature
        tl.store(partial, sums, mask=inside)
        tl.store(partial + features, squares, mask=inside)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def merge_splits_kernel(
    y_ptr,  # [rows, features], memory order, already activated
    mean_ptr,  # [features], in and out, as in relu_moments_kernel
    m2_ptr,  # [features], as mean
    partial_ptr,  # [splits, 2, features] from relu_moments_kernel
    rows,
    features,
    count,
    rows_per_split,
    splits,
    BLOCK_F: tl.constexpr,
):
    """The second stage: merges the splits in order, everything measured from the first split's pilot."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    feature = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = feature < features
    fresh = inside & (count == 0)
    stride = tl.cast(features, tl.int64)
    running = tl.load(mean_ptr + feature, mask=inside & (count > 0), other=0.0)
    pilot = _load(y_ptr + feature, fresh, dtype) + running
    offset = tl.zeros([BLOCK_F], dtype)
    m2 = tl.zeros([BLOCK_F], dtype)
    seen = tl.zeros([1], dtype)
    for split in range(splits):
        first = split * rows_per_split
        arriving = tl.minimum(rows_per_split, rows - first).to(dtype)
        own_pilot = _load(y_ptr + first * stride + feature, fresh, dtype) + running
        sums = tl.load(partial_ptr + split * 2 * stride + feature, mask=inside, other=0.0)
        squares = tl.load(partial_ptr + (split * 2 + 1) * stride + feature, mask=inside, other=0.0)
        own_offset = sums / arriving
        distance = (own_pilot - pilot) + own_offset - offset
        share = arriving / (seen + arriving)
        m2 += squares - sums * own_offset + distance * distance * (seen * share)
        offset += distance * share
        seen += arriving
    _merge(mean_ptr, m2_ptr, feature, inside, count, rows.to(dtype), pilot, offset, m2)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def relu_moments_backward_kernel(
    grad_ptr,  # [rows, features], memory order: ∂L/∂y from later layers on entry, ∂L/∂x on return
    y_ptr,  # [rows, features], laid out as grad
    shortcut_ptr,  # [rows, features], laid out as grad, or None
    a_ptr,  # [features] float32 (float64 for float64 y)
    b_ptr,  # [features], as a
    rows,
    features,
    rows_per_split,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """grad ← (grad + shortcut + a + b·y) · activation'(y)."""
    feature = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = feature < features
    a = tl.load(a_ptr + feature, mask=inside, other=0.0)
    b = tl.load(b_ptr + feature, mask=inside, other=0.0)
    first = tl.program_id(1) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    for start in range(first, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        mask = (row < last)[:, None] & inside[None, :]
        offset = row.to(tl.int64)[:, None] * features + feature[None, :]
        y = _load(y_ptr + offset, mask, a.dtype)
        gradient = _load(grad_ptr + offset, mask, a.dtype)
        if shortcut_ptr is not None:
            gradient += _load(shortcut_ptr + offset, mask, a.dtype)
        gradient += a[None, :] + b[None, :] * y
        if ACTIVATION == "relu":
            gradient = tl.where(y > 0.0, gradient, 0.0)
        elif ACTIVATION == "relu6":
            gradient = tl.where((y > 0.0) & (y < 6.0), gradient, 0.0)
        tl.store(grad_ptr + offset, _narrow(gradient, grad_ptr.dtype.element_ty), mask=mask)


def _collect(
    x: Tensor, mean: Tensor, m2: Tensor, count: int, bias: Tensor | None, residual: Tensor | None, activation: str
) -> None:
    values = feature_rows(x)
    rows, features = values.shape
    shortcut = None if residual is None else feature_rows(residual)
    channels = x.shape[1]
    inner = 1 if is_channels_last(x) else features // channels
    plan = launching.tiling(rows, features, launching.processors(x.device), mean.dtype == torch.float64)
    changes = activation != "none" or bias is not None or residual is not None
    partial = None if plan.splits == 1 else mean.new_empty(plan.splits, 2, features)
    launching.launch(
        relu_moments_kernel, x.device, (triton.cdiv(features, plan.block_f), plan.splits),
        values, bias, shortcut, mean, m2, partial, rows, features, channels, inner, count, plan.rows_per_split,
        ACTIVATION=activation, CHANGES=changes, BLOCK_N=plan.block_n, BLOCK_F=plan.block_f, num_warps=NUM_WARPS,
    )  # fmt: skip
    if partial is not None:
        launching.launch(
            merge_splits_kernel, x.device, (triton.cdiv(features, BLOCK_MERGE),),
            values, mean, m2, partial, rows, features, count, plan.rows_per_split, plan.splits, BLOCK_F=BLOCK_MERGE,
        )  # fmt: skip


@operator("triton")
def relu_moments(
    x: Tensor,
    mean: Tensor,
    m2: Tensor,
    count: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> None:
    """See `kernels.relu_moments`."""
    _collect(x, mean, m2, count, bias, residual, activation)


@operator("triton")
def relu_moments_backward(
    grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str = "relu", shortcut: Tensor | None = None
) -> None:
    """See `kernels.relu_moments_backward`."""
    values = feature_rows(y)
    rows, features = values.shape
    around = None if shortcut is None else feature_rows(shortcut)
    plan = launching.tiling(rows, features, launching.processors(y.device), a.dtype == torch.float64)
    launching.launch(
        relu_moments_backward_kernel, y.device, (triton.cdiv(features, plan.block_f), plan.splits),
        feature_rows(grad), values, around, a, b, rows, features, plan.rows_per_split,
        ACTIVATION=activation, BLOCK_N=plan.block_n, BLOCK_F=plan.block_f, num_warps=NUM_WARPS,
    )  # fmt: skip


@operator("triton")
def dataset_moments(
    x: Tensor,
    mean: Tensor,
    m2: Tensor,
    count: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    images: int = 0,
) -> None:
    """See `kernels.dataset_moments`: one pass over the activations, with sums in float64 from the first to the last."""
    _collect(x, mean, m2, count, bias, residual, activation)
