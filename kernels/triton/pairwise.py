"""Sums over all pairs of rows, and nearest rows, in Triton.

Rows are converted, centred and padded with zeros to whole blocks first, so that every access is aligned and only
columns beyond the last have to be masked. Then two kernels take turns over panels of at most `SCRATCH` pairs:

1. A program of `pairwise_sums_kernel` owns `block` rows and walks along its columns, tile by tile: products over all
   features, f and f' of them, sums in registers; it stores f'.
2. A program of `weighted_rows_kernel` owns `block` rows and `BLOCK_F` features of the gradient, and adds up f'·y.

Where rows are too few to fill the device, columns are split among programs, each with results of its own, which are
added in order: no atomics, the same bits every time. Float32 products are 3×TF32: squared distances are differences,
and would lose in TF32 what is left of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import plain
from kernels.layout import accumulation_dtype
from kernels.operators import operator
from kernels.profiles import MOST_PARAMETERS, PROFILES, rounding_floor
from kernels.triton import launching
from kernels.triton.launching import NUM_WARPS, RUNTIME_SIZES

# Rows and columns of a tile, by dtype: float64 accumulators take twice the registers.
BLOCKS = {torch.float32: 64, torch.float64: 32}
# Features that are multiplied at once, to which all are padded; and features of a program of the gradient.
BLOCK_K, BLOCK_F = 16, 64
# Pairs of a panel: 16 MiB of f' in float32 stay in the cache between the two kernels.
SCRATCH = 2**22
STRIP_ROWS = 4096
# The offset of rows that are no columns.
APART = -(2**30)


@triton.jit
def _store_number(pointer, number):
    # Widened by hand: the interpreter passes plain Python floats, which become float32.
    tl.store(pointer, tl.full([], 0.0, tl.float64) + number)


@triton.jit
def numbers_kernel(
    numbers_ptr,  # [8] float64, out
    n0: tl.float64, n1: tl.float64, n2: tl.float64, n3: tl.float64,
    n4: tl.float64, n5: tl.float64, n6: tl.float64, n7: tl.float64,
):  # fmt: skip
    """The host's numbers on the device, without a copy that the host would wait for."""
    _store_number(numbers_ptr + 0, n0)
    _store_number(numbers_ptr + 1, n1)
    _store_number(numbers_ptr + 2, n2)
    _store_number(numbers_ptr + 3, n3)
    _store_number(numbers_ptr + 4, n4)
    _store_number(numbers_ptr + 5, n5)
    _store_number(numbers_ptr + 6, n6)
    _store_number(numbers_ptr + 7, n7)


@triton.jit
def _term(t, parameter, KERNEL: tl.constexpr):
    """(f, f') of a tile for one parameter of a kernel that is a sum of such terms."""
    if KERNEL == "gaussian":
        rate = -0.5 / (parameter * parameter)
        value = tl.exp(t * rate)
        slope = value * rate
    elif KERNEL == "rational-quadratic":
        inverse = 1.0 / (1.0 + t * (0.5 / parameter))
        value = tl.exp(parameter * tl.log(inverse))
        slope = -0.5 * value * inverse
    else:
        inverse = 1.0 / (parameter + t)
        value = parameter * inverse
        slope = -value * inverse
    return value, slope


@triton.jit
def profile(t, norms, numbers_ptr, count, KERNEL: tl.constexpr):
    """(f(t), f'(t)) of a tile; see `_numbers` for what the `count` numbers are."""
    dtype: tl.constexpr = t.dtype
    first = tl.load(numbers_ptr).to(dtype)
    if KERNEL == "polynomial":
        share = tl.load(numbers_ptr + 1).to(dtype)
        base = t * share + 1.0
        lower = tl.full(t.shape, 1.0, dtype)
        for _ in range(1, first.to(tl.int32)):
            lower *= base
        value = lower * base
        slope = lower * (first * share)
    elif KERNEL == "energy":
        alike = (t == 0.0) | (t <= norms * first)  # a NaN is not, and stays one
        roots = tl.sqrt(tl.where(alike, 1.0, t))
        value = tl.where(alike, 0.0, -roots)
        slope = tl.where(alike, 0.0, -0.5 / roots)
    else:
        # A loop, not unrolled: all terms side by side are too many registers.
        value, slope = _term(t, first, KERNEL)
        for index in range(1, count):
            another, its_slope = _term(t, tl.load(numbers_ptr + index).to(dtype), KERNEL)
            value += another
            slope += its_slope
    return value, slope


@triton.jit
def _products(x_ptr, y_ptr, row, column, features, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """x_i·y_j [BLOCK_N, BLOCK_M] over all features."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    feature = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * features + feature[None, :]
    y_at = y_ptr + column.to(tl.int64)[None, :] * features + feature[:, None]
    products = tl.zeros([BLOCK_N, BLOCK_M], dtype)
    for start in range(0, features, BLOCK_K):
        x = tl.load(x_at + start)
        y = tl.load(y_at + start)
        products = tl.dot(x, y, products, input_precision="tf32x3", out_dtype=dtype)
    return products


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def pairwise_sums_kernel(
    x_ptr,  # [rows, features] float32 or float64, centred for radial kernels, padded
    y_ptr,  # [panel, features], as x: the columns of this panel
    x_norms_ptr,  # [rows], as x: ‖x_i‖², or None
    y_norms_ptr,  # [panel], or None
    sums_ptr,  # [splits, rows] float64, out: Σ_j f
    slope_sums_ptr,  # [splits, rows], as x, out: Σ_j f', or None
    slopes_ptr,  # [rows, panel], as x, out: f', or None
    numbers_ptr,  # [8] float64
    features,
    rows,
    columns,  # of this panel, without what is padded
    panel,
    offset,  # of the first row from the first column, where x is paired with itself; otherwise `APART`
    diagonal,  # 1 if a row is paired with itself, too
    columns_per_split,
    count,  # of numbers
    KERNEL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of f and f' over this program's columns, and f' of all of its pairs."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float64)
    slope_total = tl.zeros([BLOCK_N], dtype)
    first = tl.program_id(1) * columns_per_split
    last = tl.minimum(first + columns_per_split, panel)
    for start in range(first, last, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        t = _products(x_ptr, y_ptr, row, column, features, BLOCK_K, BLOCK_N, BLOCK_M)
        norms = t
        if x_norms_ptr is not None:
            norms = tl.load(x_norms_ptr + row)[:, None] + tl.load(y_norms_ptr + column)[None, :]
            t = tl.maximum(norms - 2.0 * t, 0.0, propagate_nan=tl.PropagateNan.ALL)
        same = (row + offset)[:, None] == column[None, :]
        if x_norms_ptr is not None:
            t = tl.where(same, 0.0, t)
        counts = (column < columns)[None, :] & ((diagonal != 0) | ~same)
        value, slope = profile(t, norms, numbers_ptr, count, KERNEL)
        total += tl.sum(tl.where(counts, value, 0.0), axis=1).to(tl.float64)
        if slopes_ptr is not None:
            if x_norms_ptr is not None:
                counts = counts & ~same  # x_i − x_i = 0
            slope = tl.where(counts, slope, 0.0)
            slope_total += tl.sum(slope, axis=1)
            tl.store(slopes_ptr + row.to(tl.int64)[:, None] * panel + column[None, :], slope)
    at = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(sums_ptr + at, total)
    if slopes_ptr is not None:
        tl.store(slope_sums_ptr + at, slope_total)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def weighted_rows_kernel(
    slopes_ptr,  # [rows, panel] float32 or float64
    y_ptr,  # [panel, features], as slopes
    partial_ptr,  # [splits, rows, features], as slopes, out
    features,
    rows,
    panel,
    columns_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Σ_j f'_ij y_j over this program's columns, for its rows and features."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (feature < features)[None, :]
    first = tl.program_id(2) * columns_per_split
    last = tl.minimum(first + columns_per_split, panel)
    total = tl.zeros([BLOCK_N, BLOCK_F], dtype)
    for start in range(first, last, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        slopes = tl.load(slopes_ptr + row.to(tl.int64)[:, None] * panel + column[None, :])
        y = tl.load(y_ptr + column.to(tl.int64)[:, None] * features + feature[None, :], mask=inside, other=0.0)
        total = tl.dot(slopes, y, total, input_precision="tf32x3", out_dtype=dtype)
    at = (tl.program_id(2).to(tl.int64) * rows + row)[:, None] * features + feature[None, :]
    tl.store(partial_ptr + at, total, mask=inside)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def nearest_kernel(
    x_ptr,  # [rows, features] float32 or float64, centred, padded
    y_ptr,  # [panel, features], as x
    y_norms_ptr,  # [panel], as x: ‖y_j‖²
    best_ptr,  # [splits, rows], as x, out: the smallest ‖y_j‖² − 2 x_i·y_j
    index_ptr,  # [splits, rows] int64, out: its j, the first of equal ones
    features,
    rows,
    columns,
    columns_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The nearest of this program's columns; ‖x_i‖² is the same for all, and left out."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], float("inf"), dtype)
    index = tl.zeros([BLOCK_N], tl.int64)
    first = tl.program_id(1) * columns_per_split
    last = tl.minimum(first + columns_per_split, columns)
    for start in range(first, last, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        products = _products(x_ptr, y_ptr, row, column, features, BLOCK_K, BLOCK_N, BLOCK_M)
        t = tl.load(y_norms_ptr + column)[None, :] - 2.0 * products
        t = tl.where((column < columns)[None, :], t, float("inf"))
        smallest, where = tl.min(t, axis=1, return_indices=True, return_indices_tie_break_left=True)
        closer = smallest < best
        best = tl.where(closer, smallest, best)
        index = tl.where(closer, (start + where).to(tl.int64), index)
    at = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(best_ptr + at, best)
    tl.store(index_ptr + at, index)


@dataclass(frozen=True)
class Operand:
    """Rows as the kernels read them.

    Attributes:
        values: [rows, features] in `accumulation_dtype`, padded with zeros to whole blocks.
        norms: [rows], ‖·‖² of centred rows; None for kernels of x·y.
        count: rows without what is padded.
    """

    values: Tensor
    norms: Tensor | None
    count: int

    @classmethod
    def of(cls, x: Tensor, shift: Tensor | None, block: int) -> Operand:
        """`x` [n, F], centred by `shift` [F] if there is one."""
        (count, features), dtype = x.shape, accumulation_dtype(x.dtype)
        rows, width = (triton.cdiv(size, whole) * whole for size, whole in ((count, block), (features, BLOCK_K)))
        values = x.new_zeros(rows, width, dtype=dtype)
        values[:count, :features] = x
        if shift is None:
            return cls(values, None, count)
        values[:count, :features] -= shift
        return cls(values, values.square().sum(dim=1), count)

    def part(self, start: int, stop: int) -> Operand:
        """Rows from a whole block on, to another or to the last."""
        norms = None if self.norms is None else self.norms[start:stop]
        return Operand(self.values[start:stop], norms, min(self.count, stop) - start)


def division(programs: int, tiles: int, processors: int) -> tuple[int, int]:
    """(splits, tiles of a split) such that `programs` times the splits give every multiprocessor two, if they can."""
    wanted = min(tiles, max(1, 2 * processors // programs))
    per_split = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, per_split), per_split


def _parts(operand: Operand, most: int) -> Iterator[tuple[int, int]]:
    rows = len(operand.values)
    return ((start, min(start + most, rows)) for start in range(0, rows, most))


def _numbers(kernel: str, parameters: Sequence[float], x: Tensor, features: int) -> Tensor:
    """[8] float64: the parameters; also 1/F for a polynomial, and the rounding floor for the energy kernel."""
    numbers = list(parameters)
    if kernel == "polynomial":
        numbers.append(1 / features)
    elif kernel == "energy":
        numbers.append(rounding_floor(features, torch.finfo(x.dtype).eps))
    numbers += [1.0] * (MOST_PARAMETERS - len(numbers))
    result = x.new_empty(MOST_PARAMETERS, dtype=torch.float64)
    launching.launch(numbers_kernel, x.device, (1,), result, *numbers, num_warps=1)
    return result


def _panel_sums(
    own: Operand, panel: Operand, kernel: str, numbers: Tensor, count: int, offset: int, diagonal: bool, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ f and Σ f' [rows], and Σ f'·y [rows, features], over the columns of one panel."""
    x, y, block = own.values, panel.values, BLOCKS[own.values.dtype]
    (rows, features), width = x.shape, len(y)
    processors = launching.processors(x.device)
    splits, tiles = division(rows // block, width // block, processors)
    sums = x.new_empty(splits, rows, dtype=torch.float64)
    slope_sums, slopes = (x.new_empty(splits, rows), x.new_empty(rows, width)) if gradient else (None, None)
    launching.launch(
        pairwise_sums_kernel, x.device, (rows // block, splits),
        x, y, own.norms, panel.norms, sums, slope_sums, slopes, numbers, features, rows, panel.count, width, offset,
        int(diagonal), tiles * block, count, KERNEL=kernel, BLOCK_N=block, BLOCK_M=block, BLOCK_K=BLOCK_K,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    if slope_sums is None:
        return sums.sum(dim=0), x, x
    blocks = triton.cdiv(features, BLOCK_F)
    splits, tiles = division(rows // block * blocks, width // block, processors)
    partial = x.new_empty(splits, rows, features)
    launching.launch(
        weighted_rows_kernel, x.device, (rows // block, blocks, splits),
        slopes, y, partial, features, rows, width, tiles * block, BLOCK_N=block, BLOCK_K=BLOCK_K, BLOCK_F=BLOCK_F,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return sums.sum(dim=0), slope_sums.sum(dim=0), partial.sum(dim=0)


@operator("triton")
@torch.no_grad()
def pairwise_sums(
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    parameters: Sequence[float] = (),
    diagonal: bool = True,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """See `kernels.pairwise_sums`."""
    if kernel == "linear":
        return plain.linear_sums(x, y, diagonal, gradient)
    (count, features), radial = x.shape, PROFILES[kernel].radial
    dtype = accumulation_dtype(x.dtype)
    shift, block = plain.mean_row(x, y) if radial else None, BLOCKS[dtype]
    rows = Operand.of(x, shift, block)
    columns = rows if y is None else Operand.of(y, shift, block)
    numbers = _numbers(kernel, parameters, rows.values, features)
    sums = x.new_zeros(len(rows.values), dtype=torch.float64)
    slope_sums = rows.values.new_zeros(len(rows.values), 1)
    result = torch.zeros_like(rows.values) if gradient else rows.values.new_empty(0, features)
    for top, bottom in _parts(rows, STRIP_ROWS):
        own = rows.part(top, bottom)
        for left, right in _parts(columns, max(SCRATCH // (bottom - top) // block, 1) * block):
            panel = columns.part(left, right)
            offset = top - left if y is None else APART
            found = _panel_sums(own, panel, kernel, numbers, len(parameters), offset, diagonal, gradient)
            sums[top:bottom] += found[0]
            if gradient:
                slope_sums[top:bottom, 0] += found[1]
                result[top:bottom] += found[2]
    if gradient:
        if radial:
            result.neg_().addcmul_(rows.values, slope_sums).mul_(2)
        result = result[:count, :features].contiguous()
    return sums[:count].clone(), result


@operator("triton")
@torch.no_grad()
def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.nearest`."""
    shift, block = plain.mean_row(x, y), BLOCKS[accumulation_dtype(x.dtype)]
    own, others = Operand.of(x, shift, block), Operand.of(y, shift, block)
    (rows, features), tiles = own.values.shape, len(others.values) // block
    splits, tiles = division(rows // block, tiles, launching.processors(x.device))
    best = own.values.new_empty(splits, rows)
    index = own.values.new_empty(splits, rows, dtype=torch.int64)
    launching.launch(
        nearest_kernel, x.device, (rows // block, splits),
        own.values, others.values, others.norms, best, index, features, rows, others.count, tiles * block,
        BLOCK_N=block, BLOCK_M=block, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS,
    )  # fmt: skip
    # Of equal ones `argmin` takes the first, so the one with the lowest index.
    found = index.gather(0, best.argmin(dim=0, keepdim=True))[0, : len(x)].clone()
    return found, plain.squared_differences(x, y, found)
