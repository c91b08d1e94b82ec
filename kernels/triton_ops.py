"""The three operations in Triton: CUDA devices, and a CPU inside Triton's interpreter (TRITON_INTERPRET=1).

Both passes over the activations see a tap as rows [N, F] in memory order, F contiguous across lanes. A program owns
`BLOCK_F` features and walks down its rows tile by tile, every thread moving 16 bytes at a time, so that all sums over
images stay inside one program. A tap that is too small to fill the device that way (a few thousand features) is split
over the rows too; each split leaves its sums in a scratch buffer, and a second kernel adds them in order: no atomics,
the same bits every time. Sizes are runtime arguments, so no shape compiles anything again; what Triton specialises on
is whether F is a multiple of 16 (then rows are aligned) and whether pointers are.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import feature_rows, is_channels_last
from kernels.operators import operator

# A tile has this many elements in every dtype: 16 loads in flight per thread would be too many registers for two
# accumulators, 4 too few bytes in flight per multiprocessor.
TILE_ELEMENTS = 4096
NUM_WARPS = 8
# Widest first: whole pages of DRAM while that still gives every multiprocessor two programs; 64 features of bfloat16
# are one 128-byte line, the narrowest that wastes nothing.
BLOCKS_F = (256, 128, 64)
# A split of fewer rows would spend more time on its partial sums than on its rows.
MIN_ROWS_PER_SPLIT = 16
# Features of a program of the one-dimensional kernels: of the averager, and of the merge, whose float64 variant holds
# twice as much.
BLOCK_D = 1024
BLOCK_MERGE = 512
# What a device has where none can be asked (the interpreter): an H100's multiprocessors.
NOMINAL_PROCESSORS = 132

# Whether Triton, its own library included, was imported with TRITON_INTERPRET=1.
INTERPRETED = triton.knobs.runtime.interpret and not isinstance(tl.sum, triton.JITFunction)
_RUNTIME_SIZES = ["rows", "channels", "inner", "count", "rows_per_split", "splits", "dof", "programs"]


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
def _activate_tile(x_ptr, residual_ptr, bias, row, last, feature, features, ACTIVATION: tl.constexpr):
    """Read a tile of x once, overwrite it with y, and return y as stored (in float) with the tile's mask."""
    mask = (row < last)[:, None] & (feature < features)[None, :]
    offset = row.to(tl.int64)[:, None] * features + feature[None, :]
    value = _load(x_ptr + offset, mask, bias.dtype) + bias[None, :]
    if residual_ptr is not None:
        value += _load(residual_ptr + offset, mask, bias.dtype)
    y = _narrow(_activate(value, ACTIVATION), x_ptr.dtype.element_ty)
    tl.store(x_ptr + offset, y, mask=mask)
    return _widen(y, bias.dtype), mask


@triton.jit
def _merge(mean_ptr, m2_ptr, feature, inside, count, arriving, pilot, offset, m2):
    """Chan, Golub, LeVeque 1979: `arriving` images of mean pilot + offset join `count` images of mean pilot."""
    before = count.to(pilot.dtype)
    share = arriving / (before + arriving)
    earlier = tl.load(m2_ptr + feature, mask=inside & (count > 0), other=0.0)
    tl.store(m2_ptr + feature, earlier + m2 + offset * offset * (before * share), mask=inside)
    tl.store(mean_ptr + feature, pilot + offset * share, mask=inside)


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def relu_moments_kernel(
    x_ptr,  # [rows, features], memory order: x on entry, y on return
    bias_ptr,  # [channels] or None
    residual_ptr,  # [rows, features], laid out as x, or None
    mean_ptr,  # [features] float32 (float64 for float64 x): of the `count` images before, then of all
    m2_ptr,  # [features], as mean
    partial_ptr,  # [splits, 2, features], as mean, or None: sums around the first row of each split
    rows,
    features,
    channels,
    inner,  # neighbours in memory that share a channel: 1 for channels_last, H·W for contiguous
    count,
    rows_per_split,
    ACTIVATION: tl.constexpr,
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
    bias = tl.zeros([BLOCK_F], dtype)
    if bias_ptr is not None:
        bias += _load(bias_ptr + (feature // inner) % channels, inside, dtype)
    first = tl.program_id(1) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)

    row = first + tl.arange(0, BLOCK_N)
    y, mask = _activate_tile(x_ptr, residual_ptr, bias, row, last, feature, features, ACTIVATION)
    # From registers: another warp may already have overwritten the first row in memory.
    first_row = tl.sum(tl.where((row == first)[:, None], y, 0.0), axis=0)
    running = tl.load(mean_ptr + feature, mask=inside & (count > 0), other=0.0)
    pilot = tl.where(count > 0, running, first_row)
    centred = tl.where(mask, y - pilot[None, :], 0.0)
    sums = centred
    squares = centred * centred
    for start in range(first + BLOCK_N, last, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        y, mask = _activate_tile(x_ptr, residual_ptr, bias, row, last, feature, features, ACTIVATION)
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


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
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


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def relu_moments_backward_kernel(
    grad_ptr,  # [rows, features], memory order: ∂L/∂y from later layers on entry, ∂L/∂x on return
    y_ptr,  # [rows, features], laid out as grad
    a_ptr,  # [features] float32 (float64 for float64 y)
    b_ptr,  # [features], as a
    rows,
    features,
    rows_per_split,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """grad ← (grad + a + b·y) · activation'(y)."""
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
        gradient = _load(grad_ptr + offset, mask, a.dtype) + a[None, :] + b[None, :] * y
        if ACTIVATION == "relu":
            gradient = tl.where(y > 0.0, gradient, 0.0)
        elif ACTIVATION == "relu6":
            gradient = tl.where((y > 0.0) & (y < 6.0), gradient, 0.0)
        tl.store(grad_ptr + offset, _narrow(gradient, grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64 by squaring, for an int64 exponent ≥ 0 on the device."""
    result = tl.full([], 1.0, tl.float64)
    square = result * base
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * square, result)
        square = square * square
        exponent = exponent // 2
    return result


@triton.jit
def _direct(
    moment, target, scale, row, feature, inside, features,
    v_ptr, m_ptr, u_ptr, fresh, rate, decay1, decay2, eps, correction1, correction2,
    RULE: tl.constexpr, ADVANCE: tl.constexpr,
):  # fmt: skip
    """One row (means or variances) of the averager: returns (direction, loss, difference), all [BLOCK]."""
    at = tl.cast(features, tl.int64) * row + feature
    difference = scale * (target - moment)
    if RULE == "none":
        direction = 2 * difference
        loss = difference * difference
    elif RULE == "ma_moments":
        average = tl.load(v_ptr + at, mask=inside, other=0.0)
        average += rate * (moment - average)
        average = tl.where(fresh, moment, average)
        if ADVANCE:
            tl.store(v_ptr + at, average, mask=inside)
        remainder = scale * (target - average)
        direction = remainder * (2 * rate / features)
        loss = remainder * remainder / features
    else:
        direction = tl.load(v_ptr + at, mask=inside, other=0.0)
        if RULE == "ma" and ADVANCE:
            direction += rate * (difference - direction)
            tl.store(v_ptr + at, direction, mask=inside)
        if RULE == "ama" and ADVANCE:
            g = direction - difference
            m = tl.load(m_ptr + at, mask=inside, other=0.0)
            u = tl.load(u_ptr + at, mask=inside, other=0.0)
            m += decay1 * (g - m)
            u += decay2 * (g * g - u)
            direction -= rate * (m / correction1) / (tl.sqrt(u / correction2) + eps)
            tl.store(m_ptr + at, m, mask=inside)
            tl.store(u_ptr + at, u, mask=inside)
            tl.store(v_ptr + at, direction, mask=inside)
        loss = direction * difference
    return direction, loss, difference


@triton.jit
def _scalar(value, dtype: tl.constexpr):
    """A host's float argument as a float64 scalar, then `dtype` (the interpreter passes plain Python floats)."""
    return (tl.full([], 0.0, tl.float64) + value).to(dtype)


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def averager_step_kernel(
    mean_ptr,  # [features] float32 (or float64, then everything below is)
    m2_ptr,  # [features]
    target_mean_ptr,  # [features]
    target_variance_ptr,  # [features]
    weight_ptr,  # [features] or None
    v_ptr,  # [2, features], changed in place when ADVANCE; row 0 for means, row 1 for variances; None for "none"
    m_ptr,  # [2, features], as v; only "ama" has it
    u_ptr,  # [2, features], as m
    step_ptr,  # [] int64, steps taken before this one; only read here
    a_ptr,  # [features], out
    b_ptr,  # [features], out
    partial_ptr,  # [4, programs] float64, out: this program's share of `sums`
    features,
    count,
    dof,
    programs,
    rate: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    RULE: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Δ, the rule's new direction v, the coefficients a and b, and partial sums of the loss, for BLOCK features."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    program = tl.program_id(0)
    feature = program * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    images = count.to(dtype)
    freedom = dof.to(dtype)
    step = tl.load(step_ptr)
    # 1 − β^t in float64: in float32, 1 − 0.999 is already off by 1.3e-5.
    correction1 = (1.0 - _power(beta1, step + 1)).to(dtype)
    correction2 = (1.0 - _power(beta2, step + 1)).to(dtype)
    decay1 = _scalar(1.0 - beta1, dtype)
    decay2 = _scalar(1.0 - beta2, dtype)
    alpha = _scalar(rate, dtype)
    epsilon = _scalar(eps, dtype)
    fresh = step == 0

    scale = tl.full([BLOCK], 1.0, dtype)
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + feature, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + feature, mask=inside, other=0.0)
    target = tl.load(target_mean_ptr + feature, mask=inside, other=0.0)
    direction, loss_mean, difference_mean = _direct(
        mean, target, scale, 0, feature, inside, features,
        v_ptr, m_ptr, u_ptr, fresh, alpha, decay1, decay2, epsilon, correction1, correction2, RULE, ADVANCE,
    )  # fmt: skip
    a = -scale * direction / images
    variance = tl.load(m2_ptr + feature, mask=inside, other=0.0) / freedom
    target = tl.load(target_variance_ptr + feature, mask=inside, other=0.0)
    scale = scale * scale
    direction, loss_variance, difference_variance = _direct(
        variance, target, scale, 1, feature, inside, features,
        v_ptr, m_ptr, u_ptr, fresh, alpha, decay1, decay2, epsilon, correction1, correction2, RULE, ADVANCE,
    )  # fmt: skip
    b = scale * direction * (-2.0 / freedom)
    tl.store(b_ptr + feature, b, mask=inside)
    tl.store(a_ptr + feature, a - b * mean, mask=inside)

    partial = partial_ptr + program
    _store_sum(partial, loss_mean, inside)
    _store_sum(partial + programs, loss_variance, inside)
    _store_sum(partial + 2 * programs, difference_mean * difference_mean, inside)
    _store_sum(partial + 3 * programs, difference_variance * difference_variance, inside)


@triton.jit
def _store_sum(pointer, terms, inside):
    # Lanes beyond the last feature hold the rule applied to zeros, which ε = 0 makes NaN.
    tl.store(pointer, tl.sum(tl.where(inside, terms, 0.0).to(tl.float64), axis=0))


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def sum_partials_kernel(
    partial_ptr,  # [4, programs] float64
    sums_ptr,  # [4] float64, out
    step_ptr,  # [] int64, counted up when ADVANCE, after every program of the first stage has read it
    programs,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second stage of the loss: one program adds the partial sums in order."""
    for term in tl.static_range(4):
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, programs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + term * programs + index, mask=index < programs, other=0.0)
        tl.store(sums_ptr + term, tl.sum(total, axis=0))
    if ADVANCE:
        tl.store(step_ptr, tl.load(step_ptr) + 1)


@dataclass(frozen=True)
class Tiling:
    """How programs share the rows [N, F] of a tap.

    Attributes:
        block_n, block_f: rows and features of one tile.
        splits: programs that share a block of features, each with `rows_per_split` rows (the last may have fewer).
    """

    block_n: int
    block_f: int
    splits: int
    rows_per_split: int


@functools.lru_cache(maxsize=1024)
def tiling(rows: int, features: int, processors: int) -> Tiling:
    """The widest block that gives every multiprocessor two programs, else the narrowest, split over the rows.

    Splits only begin where even narrow blocks leave half of the multiprocessors idle (fewer than 64 · processors / 2
    features): partial sums cost 16 bytes per feature and split.
    """
    block_f = next((block for block in BLOCKS_F if features >= 2 * processors * block), BLOCKS_F[-1])
    blocks = triton.cdiv(features, block_f)
    wanted = max(1, min(processors // blocks, rows // MIN_ROWS_PER_SPLIT))
    rows_per_split = triton.cdiv(rows, wanted)
    return Tiling(TILE_ELEMENTS // block_f, block_f, triton.cdiv(rows, rows_per_split), rows_per_split)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return NOMINAL_PROCESSORS


def launch(kernel, device: torch.device, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Every kernel goes through here (the audit listens): `kernel[grid](*arguments, **constants)` on `device`."""
    other_device = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    with torch.cuda.device(device) if other_device else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


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
    values = feature_rows(x)
    rows, features = values.shape
    shortcut = None if residual is None else feature_rows(residual)
    channels = x.shape[1]
    inner = 1 if is_channels_last(x) else features // channels
    plan = tiling(rows, features, _processors(x.device))
    partial = None if plan.splits == 1 else mean.new_empty(plan.splits, 2, features)
    launch(
        relu_moments_kernel, x.device, (triton.cdiv(features, plan.block_f), plan.splits),
        values, bias, shortcut, mean, m2, partial, rows, features, channels, inner, count, plan.rows_per_split,
        ACTIVATION=activation, BLOCK_N=plan.block_n, BLOCK_F=plan.block_f, num_warps=NUM_WARPS,
    )  # fmt: skip
    if partial is not None:
        launch(
            merge_splits_kernel, x.device, (triton.cdiv(features, BLOCK_MERGE),),
            values, mean, m2, partial, rows, features, count, plan.rows_per_split, plan.splits, BLOCK_F=BLOCK_MERGE,
        )  # fmt: skip


@operator("triton")
def relu_moments_backward(grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str = "relu") -> None:
    """See `kernels.relu_moments_backward`."""
    values = feature_rows(y)
    rows, features = values.shape
    plan = tiling(rows, features, _processors(y.device))
    launch(
        relu_moments_backward_kernel, y.device, (triton.cdiv(features, plan.block_f), plan.splits),
        feature_rows(grad), values, a, b, rows, features, plan.rows_per_split,
        ACTIVATION=activation, BLOCK_N=plan.block_n, BLOCK_F=plan.block_f, num_warps=NUM_WARPS,
    )  # fmt: skip


@operator("triton")
def averager_step(
    mean: Tensor,
    m2: Tensor,
    count: int,
    target_mean: Tensor,
    target_variance: Tensor,
    v: Tensor,
    m: Tensor,
    u: Tensor,
    step: Tensor,
    *,
    rule: str,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    correction: int,
    advance: bool,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.averager_step`."""
    features = mean.numel()
    programs = triton.cdiv(features, BLOCK_D)
    a, b = torch.empty_like(mean), torch.empty_like(mean)
    partial = mean.new_empty(4, programs, dtype=torch.float64)
    sums = mean.new_empty(4, dtype=torch.float64)
    launch(
        averager_step_kernel, mean.device, (programs,),
        mean, m2, target_mean, target_variance, weight, v, m, u, step, a, b, partial,
        features, count, count - correction, programs, rate, beta1, beta2, eps,
        RULE=rule, ADVANCE=advance, BLOCK=BLOCK_D,
    )  # fmt: skip
    launch(
        sum_partials_kernel, mean.device, (1,),
        partial, sums, step, programs, ADVANCE=advance and rule != "none", BLOCK=BLOCK_D,
    )  # fmt: skip
    return a, b, sums
