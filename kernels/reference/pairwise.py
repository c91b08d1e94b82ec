"""Sums over all pairs of rows, and nearest rows, in plain PyTorch: the whole matrix [n, m], and a few more like it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import plain
from kernels.layout import accumulation_dtype
from kernels.operators import operator
from kernels.profiles import PROFILES, rounding_floor


def profile(kernel: str, t: Tensor, parameters: Sequence[float], features: int) -> tuple[Tensor, Tensor]:
    """(f(t), f'(t)) [n, m] of `kernels.pairwise_sums`; t is ‖x−y‖², or x·y of rows [F]."""
    if kernel == "linear":
        return t, torch.ones_like(t)
    if kernel == "polynomial":
        (degree,) = parameters
        base = t / features + 1
        return base.pow(degree), base.pow(degree - 1) * (degree / features)
    if kernel == "energy":
        roots = t.sqrt()
        return -roots, torch.where(t == 0, 0, -0.5 / roots)
    f, slope = torch.zeros_like(t), torch.zeros_like(t)
    for parameter in parameters:
        if kernel == "gaussian":
            term = torch.exp(t * (-0.5 / parameter**2))
            slope += term * (-0.5 / parameter**2)
        elif kernel == "rational-quadratic":
            base = 1 + t / (2 * parameter)
            term = base**-parameter
            slope += -0.5 * term / base
        else:
            term = parameter / (parameter + t)
            slope += -term / (parameter + t)
        f += term
    return f, slope


def squared_distances(x: Tensor, y: Tensor, itself: bool) -> tuple[Tensor, Tensor]:
    """‖x_i − y_j‖² [n, m] of centred rows, none negative and 0 on the diagonal of `itself`; ‖x_i‖² + ‖y_j‖²."""
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None, :]
    squares = (norms - 2 * (x @ y.T)).clamp_min(0)
    if itself:
        squares.fill_diagonal_(0)
    return squares, norms


@operator("reference")
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
    features, dtype, radial = x.shape[1], accumulation_dtype(x.dtype), PROFILES[kernel].radial
    shift = plain.mean_row(x, y) if radial else 0
    rows = x.to(dtype) - shift
    columns = rows if y is None else y.to(dtype) - shift
    with plain.full_precision(x.device):
        if radial:
            t, norms = squared_distances(rows, columns, y is None)
            if kernel == "energy":
                t = torch.where(t <= norms * rounding_floor(features, torch.finfo(dtype).eps), 0, t)
        else:
            t = rows @ columns.T
        values, slopes = profile(kernel, t, parameters, features)
        if not diagonal:
            values.fill_diagonal_(0)
            slopes.fill_diagonal_(0)
        sums = values.sum(dim=1, dtype=torch.float64)
        if not gradient:
            return sums, rows.new_empty(0, features)
        if not radial:
            return sums, slopes @ columns
        return sums, 2 * (rows * slopes.sum(dim=1, keepdim=True) - slopes @ columns)


@operator("reference")
@torch.no_grad()
def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.nearest`."""
    shift, dtype = plain.mean_row(x, y), accumulation_dtype(x.dtype)
    with plain.full_precision(x.device):
        squares, _ = squared_distances(x.to(dtype) - shift, y.to(dtype) - shift, itself=False)
    index = squares.argmin(dim=1)
    return index, plain.squared_differences(x, y, index)
