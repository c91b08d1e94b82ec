"""Sums over all pairs of rows, and nearest rows, in tiles: products by a library, all else in one compiled loop.

A tile is at most `TILE` rows by `TILE` columns. The compiled loop turns its products into f' in place and writes f into
another buffer; f'·Y is then added to the gradient. Columns are the outer loop, so that every tile of y is converted
and centred once. Of x against itself only the tiles on and above the diagonal are computed, and serve both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import plain
from kernels._dynamo import Kernel
from kernels.layout import accumulation_dtype
from kernels.operators import operator
from kernels.products import add_product_, row_products
from kernels.profiles import PROFILES, rounding_floor

TILE = 1024
"""Rows and columns of a tile: 4 MiB in float32, and sums of no more terms than Inductor adds plainly."""


def profile(kernel: str, t: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(f(t), f'(t)) of a tile; see `constants` for what the parameters are."""
    if kernel == "polynomial":
        share, degree, before = parameters
        base = t * share + 1
        lower = base.pow(before)
        return lower * base, lower * (degree * share)
    if kernel == "energy":
        alike = t == 0  # a NaN is not, and stays one
        roots = torch.where(alike, 1, t).sqrt()
        return torch.where(alike, 0, -roots), torch.where(alike, 0, -0.5 / roots)
    values, slopes = [], []
    for parameter in parameters:
        if kernel == "gaussian":
            values.append(torch.exp(t * parameter))
            slopes.append(values[-1] * parameter)
        elif kernel == "rational-quadratic":
            base = 1 + t / (2 * parameter)
            values.append(base.pow(-parameter))  # Inductor would store exp(−α·log1p(…)), and values are used twice
            slopes.append(-0.5 * values[-1] / base)
        else:
            values.append(parameter / (parameter + t))
            slopes.append(-values[-1] / (parameter + t))
    return sum(values[1:], values[0]), sum(slopes[1:], slopes[0])


def constants(kernel: str, parameters: Sequence[float], features: int, dtype: torch.dtype) -> list[Tensor]:
    """0-d tensors, so that no number is compiled in: −1/(2σ²) of a Gaussian; 1/F, degree and degree − 1 of a
    polynomial; the rounding floor of the energy kernel; the parameters themselves of the others."""
    values = list(parameters)
    if kernel == "gaussian":
        values = [-0.5 / parameter**2 for parameter in parameters]
    elif kernel == "polynomial":
        values = [1 / features, values[0], values[0] - 1]
    elif kernel == "energy":
        values = [rounding_floor(features, torch.finfo(dtype).eps)]
    return list(torch.tensor(values, dtype=dtype).unbind())


@Kernel
def profile_kernel(
    products: Tensor, x_norms: Tensor | None, y_norms: Tensor | None, values: Tensor | None,
    parameters: list[Tensor], kernel: str, slopes: bool,
) -> None:  # fmt: skip
    """values [R, C] ← f; products [R, C] ← f' if `slopes`, or ← f if there are no values either.

    x_norms [R, 1] and y_norms [C] of radial kernels.
    """
    t = products
    if x_norms is not None and y_norms is not None:
        norms = x_norms + y_norms
        t = (norms - 2 * products).clamp(min=0)
        if kernel == "energy":
            t = torch.where(t <= norms * parameters[0], 0, t)
    value, slope = profile(kernel, t, parameters)
    if values is not None:
        values.copy_(value)
    if slopes or values is None:
        products.copy_(slope if slopes else value)


def evaluate(
    products: Tensor, x_norms: Tensor | None, y_norms: Tensor | None, values: Tensor | None,
    parameters: list[Tensor], kernel: str,
) -> None:  # fmt: skip
    """products [R, C] ← f' and values [R, C] ← f; without values, products ← f."""
    wanted = [(values, values is not None)]
    if kernel == "gaussian" and values is not None:
        # Inductor stores every `exp` that is used twice; two loops with exponentials of their own need no memory.
        wanted = [(values, False), (None, True)]
    for out, slopes in wanted:
        arguments = (products, x_norms, y_norms, out, parameters, kernel, slopes)
        if 1 in products.shape:  # special to torch.compile, and not worth it
            profile_kernel.function(*arguments)
        else:
            key = (products.dtype, kernel, len(parameters), out is None, slopes)
            profile_kernel(products.numel(), key, *arguments)


def tiles(count: int) -> list[slice]:
    """As few and as equal slices of at most `TILE` rows as there can be."""
    parts = -(-count // TILE)
    return [slice(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def squared_norms(rows: Tensor) -> Tensor:
    """‖·‖² [n] of rows [n, F], without a matrix of squares."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square_()


class Operands:
    """x [n, F] as it is multiplied, in `accumulation_dtype`, and tiles of y that are made when they are asked for.

    Attributes:
        rows: x, centred if `radial`.
        norms: ‖x_i‖² [n, 1] of centred rows, if `radial`.
    """

    def __init__(self, x: Tensor, y: Tensor | None, radial: bool):
        self.dtype, self.y = accumulation_dtype(x.dtype), y
        self.shift = plain.mean_row(x, y) if radial else None
        self.rows = self._centred(x)
        self.norms = squared_norms(self.rows)[:, None] if radial else None

    def columns(self, part: slice) -> Tensor:
        """A tile of y, or of x itself [C, F]."""
        return self.rows[part] if self.y is None else self._centred(self.y[part])

    def _centred(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous() if self.shift is None else (x.to(self.dtype) - self.shift).contiguous()


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), plain.full_precision(device):
        yield


@operator("compiled")
def pairwise_sums(
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    parameters: Sequence[float] = (),
    diagonal: bool = True,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """See `kernels.pairwise_sums`."""
    with _plainly(x.device):
        if kernel == "linear":
            return plain.linear_sums(x, y, diagonal, gradient)
        return _in_tiles(x, y, kernel, parameters, diagonal, gradient)


def _in_tiles(
    x: Tensor, y: Tensor | None, kernel: str, parameters: Sequence[float], diagonal: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    radial, (count, features) = PROFILES[kernel].radial, x.shape
    operands = Operands(x, y, radial)
    rows, norms = operands.rows, operands.norms
    numbers = constants(kernel, parameters, features, rows.dtype)
    others = count if y is None else len(y)
    buffer = rows.new_empty(min(count, TILE) * min(others, TILE) if gradient else 0)
    sums = x.new_zeros(count, dtype=torch.float64)
    slope_sums = rows.new_zeros(count, 1)
    result = torch.zeros_like(rows) if gradient else rows.new_empty(0, features)
    for part in tiles(others):
        columns = operands.columns(part)
        column_norms = None
        if norms is not None:
            column_norms = norms[part, 0] if y is None else squared_norms(columns)
        for own in tiles(count):
            if y is None and own.start > part.start:
                continue
            products = row_products(rows[own], columns)
            itself = y is None and own == part
            if itself and norms is not None:
                products.diagonal().copy_(norms[own, 0])  # a distance of exactly 0
            values = buffer[: products.numel()].view_as(products) if gradient else products
            own_norms = None if norms is None else norms[own]
            evaluate(products, own_norms, column_norms, values if gradient else None, numbers, kernel)
            if itself and not diagonal:
                values.fill_diagonal_(0)
            sums[own] += values.sum(dim=1)
            mirrored = y is None and not itself
            if mirrored:
                sums[part] += values.sum(dim=0)
            if not gradient:
                continue
            if itself and (radial or not diagonal):
                products.fill_diagonal_(0)  # x_i − x_i = 0
            add_product_(result[own], products, columns)
            if mirrored:
                turned = buffer[: products.numel()].view(products.T.shape).copy_(products.T)  # values are used up
                add_product_(result[part], turned, rows[own])
            if radial:
                slope_sums[own] += products.sum(dim=1, keepdim=True)
                if mirrored:
                    slope_sums[part, 0] += products.sum(dim=0)
            del products  # before the next tile's are there
    if radial and gradient:
        result.neg_().addcmul_(rows, slope_sums).mul_(2)
    return sums, result


@operator("compiled")
def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.nearest`."""
    with _plainly(x.device):
        operands = Operands(x, y, radial=True)
        best = operands.rows.new_full((len(x),), float("inf"))
        index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for part in tiles(len(y)):
            columns = operands.columns(part)
            norms = squared_norms(columns)
            columns.mul_(-2)
            for own in tiles(len(x)):
                # ‖x‖² is the same for all columns; without it the smallest is that of the nearest all the same.
                smallest, where = row_products(operands.rows[own], columns, norms).min(dim=1)
                closer = smallest < best[own]
                index[own] = torch.where(closer, where + part.start, index[own])
                best[own] = torch.where(closer, smallest, best[own])
        return index, plain.squared_differences(x, y, index)
