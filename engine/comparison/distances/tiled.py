"""MMD² to a fixed set in tiles: its value and gradient come from one pass over the pairs, and no matrix of them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engine.comparison.distances.kernels import (
    Energy,
    Gaussian,
    InverseMultiquadratic,
    Kernel,
    Linear,
    Polynomial,
    RationalQuadratic,
    check_features,
)
from engine.comparison.distances.mean_embedding import MMD, mean_of_all_pairs
from engine.support.errors import InputError
from kernels import select
from kernels.profiles import MOST_PARAMETERS

TILED_PAIRS = 2**20
"""Pairs of a call, n² + n·m, from which `bound_mmd` is tiled: fewer are no more than a tile, and a matrix as good."""


def profile_of(kernel: Kernel) -> tuple[str, tuple[float, ...]] | None:
    """The name and the parameters by which `kernels.pairwise_sums` knows a kernel; None for one that it doesn't."""
    match kernel:
        case Gaussian(bandwidths=parameters) if len(parameters) <= MOST_PARAMETERS:
            return "gaussian", parameters
        case RationalQuadratic(alphas=parameters) if len(parameters) <= MOST_PARAMETERS:
            return "rational-quadratic", parameters
        case InverseMultiquadratic(scales=parameters) if len(parameters) <= MOST_PARAMETERS:
            return "imq", parameters
        case Energy():
            return "energy", ()
        case Linear():
            return "linear", ()
        case Polynomial(degree=degree):
            return "polynomial", (float(degree),)
    return None


class TiledMMD:
    """`MMD` by `kernels.pairwise_sums`: the same value, and the same gradient, once.

    A call looks at n² + n·m pairs in tiles, whatever n and m, and finds the gradient at the same time where it is
    wanted. It cannot be differentiated twice: use `MMD` where a penalty needs that.

    Args:
        y: features [m, F] of the real images; kept without a graph.
        kernel: one of `kernels.KERNELS`.
        unbiased: as for `mmd`.
        kernels: the backend, by its name (see `kernels.select`) or as a module.

    Attributes:
        constant: the mean of k(y, y), of i ≠ j if unbiased; [] float64.

    Raises:
        InputError: "y", as for `mmd`; "kernel", if it is not one that `profile_of` knows.
        ValueError: "kernels", if the backend cannot run here.
    """

    def __init__(self, y: Tensor, kernel: Kernel, unbiased: bool = False, kernels: str | ModuleType = "auto"):
        check_features("y", y, at_least=2 if unbiased else 1)
        profile = profile_of(kernel)
        if profile is None:
            raise InputError("kernel", f"has no fused sums, which have at most {MOST_PARAMETERS} widths: {kernel!r}")
        self.y, self.profile, self.unbiased, self.kernels = _wide(y.detach()), profile, unbiased, kernels
        self._backend(self.y.dtype)  # rather refused now than at the first call
        self.constant = mean_of_all_pairs(self.y, kernel, unbiased)

    def __call__(self, x: Tensor) -> Tensor:
        """MMD² of x [n, F] and y, as []; differentiable in x once.

        Raises:
            InputError: "x", if it isn't [n, F] with y's F and at least one row, or two if unbiased.
        """
        check_features("x", x, at_least=2 if self.unbiased else 1, size=self.y.shape[1])
        x = _wide(x)
        found: Tensor = _Tiled.apply(x, self.y.to(x.dtype), self.profile, self.unbiased, self._backend(x.dtype))
        return (found + self.constant).to(x.dtype)

    def _backend(self, dtype: torch.dtype) -> Any:
        return select(self.kernels, self.y.device, dtype) if isinstance(self.kernels, str) else self.kernels


def bound_mmd(
    y: Tensor, kernel: Kernel, rows: int, unbiased: bool = False, kernels: str | ModuleType = "auto"
) -> MMD | TiledMMD:
    """MMD² to y [m, F], of features [n, F] with about `rows` rows: `TiledMMD` where it saves memory, otherwise `MMD`.

    Tiled from `TILED_PAIRS` pairs on, if `profile_of` knows the kernel. Then it can be differentiated once.
    """
    tiled = rows * (rows + len(y)) >= TILED_PAIRS and profile_of(kernel) is not None
    return TiledMMD(y, kernel, unbiased, kernels) if tiled else MMD(y, kernel, unbiased)


class _Tiled(torch.autograd.Function):
    """MMD² less the constant of y, [] float64: value and gradient from the same two passes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, profile: tuple[str, tuple[float, ...]], unbiased: bool, backend: Any
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        within, gradient_within = backend.pairwise_sums(x, None, *profile, not unbiased, wanted)
        across, gradient_across = backend.pairwise_sums(x, y, *profile, True, wanted)
        inner, outer = 1 / _pairs_within(len(x), unbiased), 2 / (len(x) * len(y))
        # k is symmetric, so the second argument's gradient is the first's once more. In place: each is as large as x.
        gradient = gradient_within.mul_(2 * inner).sub_(gradient_across, alpha=outer) if wanted else None
        ctx.save_for_backward(gradient)
        found: Tensor = within.sum() * inner - across.sum() * outer
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():  # a penalty's gradient would lack this part, and nobody would be told
            raise RuntimeError("MMD in tiles has no second derivative (create_graph=True): use MMD")
        (gradient,) = ctx.saved_tensors
        return upstream.to(gradient.dtype) * gradient, None, None, None, None


def _pairs_within(count: int, unbiased: bool) -> int:
    return count * (count - 1 if unbiased else count)


def _wide(x: Tensor) -> Tensor:
    """Half precision in float32: a small difference of means would have no digits left."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
