"""Kernels where both arguments are the same point: what a scaled MMD is scaled by (Arbel et al. 2018)."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from engine.comparison.distances.kernels import (
    Gaussian,
    InverseMultiquadratic,
    Kernel,
    Linear,
    Polynomial,
    RationalQuadratic,
    Sum,
    check_features,
)
from engine.support.errors import InputError


class Diagonal(NamedTuple):
    """A kernel k(y, z) at y = z = x for each row x of [n, F]: its value, and its mixed second derivatives.

    ∂²k / ∂y_a ∂z_b = slope · δ_ab + along · x_a · x_b
    """

    value: Tensor  # [n] k(x, x)
    slope: Tensor  # [n]
    along: Tensor | None  # [n]; None if it is zero everywhere


def diagonal(kernel: Kernel, x: Tensor) -> Diagonal:
    """The `Diagonal` of a kernel at x [n, F], in x's dtype (float32 for half precision); differentiable in x.

    For a kernel g(‖y−z‖²) the value is g(0) and the slope −2 g'(0); for x·y they are ‖x‖² and 1.

    Raises:
        InputError: "x", if it isn't [n, F]; "kernel", if it has no second derivative where y = z, as −‖y−z‖, or is
            none of `kernels.KERNELS`.
    """
    check_features("x", x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    match kernel:
        case Gaussian(bandwidths=widths):
            return _radial(x, len(widths), sum(width**-2 for width in widths))
        case RationalQuadratic(alphas=alphas):
            return _radial(x, len(alphas), len(alphas))
        case InverseMultiquadratic(scales=scales):
            return _radial(x, len(scales), sum(2 / scale for scale in scales))
        case Linear():
            return Diagonal(x.square().sum(dim=1), x.new_ones(len(x)), None)
        case Polynomial(degree=degree):
            size = x.shape[1]
            base = x.square().sum(dim=1) / size + 1
            along = degree * (degree - 1) / size**2 * base.pow(degree - 2) if degree > 1 else None
            return Diagonal(base.pow(degree), degree / size * base.pow(degree - 1), along)
        case Sum(kernels=parts):
            return reduce(_added, (diagonal(part, x) for part in parts))
    raise InputError("kernel", f"has no second derivative where two features are equal; choose another than {kernel!r}")


def _radial(x: Tensor, value: float, slope: float) -> Diagonal:
    return Diagonal(x.new_full((len(x),), value), x.new_full((len(x),), slope), None)


def _added(one: Diagonal, other: Diagonal) -> Diagonal:
    if one.along is None or other.along is None:
        along = other.along if one.along is None else one.along
    else:
        along = one.along + other.along
    return Diagonal(one.value + other.value, one.slope + other.slope, along)
