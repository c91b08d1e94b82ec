"""The maximum mean discrepancy: the squared distance of two sets' mean embeddings in a kernel's Hilbert space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.comparison.distances.kernels import Energy, Kernel, check_features, fixed
from engine.support.errors import InputError

_Part = Callable[[Tensor], Tensor]  # x [n, F] → its kernels with some rows of y, [n, block]

_CONSTANT_BLOCK = 1024  # rows of y in float64 that the constant's blocks have
_BLOCK_FEATURES = 2**24  # features of y that a discrepancy sees at once: 64 MiB in float32


def mmd(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool = False) -> Tensor:
    """MMD² of features x [n, F] and y [m, F], as [] (Gretton et al. 2012, equations 5 and 3).

        biased:    1/n² Σ_ij k(x_i, x_j) − 2/(nm) Σ_ij k(x_i, y_j) + 1/m² Σ_ij k(y_i, y_j)
        unbiased:  1/(n(n−1)) Σ_i≠j k(x_i, x_j) − 2/(nm) Σ_ij k(x_i, y_j) + 1/(m(m−1)) Σ_i≠j k(y_i, y_j)

    The biased one is never negative but for rounding, and 0 if x and y are equal. The unbiased one has the mean of the
    two laws' MMD², and may be negative. KID is the unbiased one with `kernels.polynomial(3)` (Bińkowski et al. 2018).

    Differentiable in x and y as often as the kernel is. Kernels are in x's dtype (float32 for half precision), their
    sums in float64, the result in the kernels' dtype. Memory: a few matrices [n, n], [n, m] and [m, m].

    Raises:
        InputError: "x" or "y", if it isn't [n, F] with at least one row, or two if unbiased; "y", if its F isn't x's.
    """
    x, y = _checked(x, y, unbiased)
    found = mean_within(x, kernel, unbiased) - 2 * _across(x, y, kernel) + mean_within(y, kernel, unbiased)
    return found.to(x.dtype)


def energy_distance(x: Tensor, y: Tensor, unbiased: bool = False) -> Tensor:
    """The energy distance 2 E‖x−y‖ − E‖x−x'‖ − E‖y−y'‖ of features x [n, F] and y [m, F], as [] (Székely & Rizzo 2013).

    MMD² with `kernels.energy()`: no width to choose. Biased, as SciPy's for one feature squared, or with the means over
    x ≠ x' and y ≠ y'. See `mmd` for cost, derivatives and errors.
    """
    return mmd(x, y, Energy(), unbiased)


class MMD:
    """MMD² to a fixed set of features: `mmd` as a function of x alone.

    The mean of k(y, y) is computed once, in float64, a block of rows at a time: m²/2 kernels. So are the rows of y
    about their mean and their norms, where the kernel is one of distances (see `kernels.fixed`): a copy of y, which
    itself isn't kept. A call evaluates n² + n·m kernels, y a block at a time. With several blocks each one's gradient
    is computed right after its value, so that memory is for [n, n] and [n, block] kernels, whatever m. (A second
    derivative computes them again, and keeps all.) Values and gradients don't depend on the block but for rounding.

    Args:
        y: features [m, F] of the real images; no gradient reaches them.
        kernel: k(x, y) → [n, m].
        unbiased: as for `mmd`.
        block: how many rows of y a call sees at once; by default as many as have 2^24 features.

    Attributes:
        constant: the mean of k(y, y), of i ≠ j if unbiased; [] float64.

    Raises:
        InputError: "y", as for `mmd`; "block", if it is below 1.
    """

    def __init__(self, y: Tensor, kernel: Kernel, unbiased: bool = False, block: int | None = None):
        check_features("y", y, at_least=2 if unbiased else 1)
        if block is not None and block < 1:
            raise InputError("block", f"must be at least 1, got {block}")
        self.kernel, self.unbiased = kernel, unbiased
        self.count, self.size = y.shape
        y = y.detach()
        self.parts = fixed_parts(y, kernel, block or max(1, _BLOCK_FEATURES // self.size))
        self.constant = mean_of_all_pairs(y, kernel, unbiased)

    def __call__(self, x: Tensor) -> Tensor:
        """MMD² of x [n, F] and y, as []; differentiable in x as often as the kernel is.

        Raises:
            InputError: "x", if it isn't [n, F] with y's F and at least one row, or two if unbiased.
        """
        check_features("x", x, at_least=2 if self.unbiased else 1, size=self.size)
        x = _wide(x)
        across = _sum_of_part(x, self.parts[0]) if len(self.parts) == 1 else _SumInBlocks.apply(x, self.parts)
        within = mean_within(x, self.kernel, self.unbiased)
        return (within - 2 * across / (len(x) * self.count) + self.constant).to(x.dtype)


def fixed_parts(y: Tensor, kernel: Kernel, block: int) -> list[_Part]:
    """x ↦ k(x, y) in parts of `block` rows of y, each with what depends on y alone computed."""
    shift = y.mean(dim=0, dtype=torch.float64)
    return [fixed(kernel, rows, shift) for rows in torch.split(y, block)]


class _SumInBlocks(torch.autograd.Function):
    """Σ_ij k(x_i, y_j) over all parts of y, and its gradient, with one part's matrices in memory at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[_Part]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        gradient = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for part in parts:
            with torch.set_grad_enabled(gradient is not None):
                leaf = x.detach().requires_grad_(gradient is not None)
                value = _sum_of_part(leaf, part)
            total += value.detach()
            if gradient is not None:
                gradient += torch.autograd.grad(value, leaf)[0]
        ctx.parts = parts
        ctx.save_for_backward(x, gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """The gradient that forward found; under `create_graph`, the same one as a function of x."""
        x, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            sums = [_sum_of_part(x, part) for part in ctx.parts]
            (gradient,) = torch.autograd.grad(torch.stack(sums).sum(), x, create_graph=True)
        return upstream.to(x.dtype) * gradient, None


def _checked(x: Tensor, y: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Both as `_wide` has them, and still one tensor if they were: kernels have an exact diagonal then."""
    check_features("x", x, at_least=2 if unbiased else 1)
    check_features("y", y, at_least=2 if unbiased else 1, size=x.shape[1])
    wide = _wide(x)
    return wide, wide if x is y else y.to(wide.dtype)


def _wide(x: Tensor) -> Tensor:
    """Half precision in float32: a small difference of means would have no digits left."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_within(x: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    """The mean of k(x_i, x_j), of i ≠ j if unbiased; [] float64."""
    matrix = kernel(x, x)
    total = matrix.sum(dtype=torch.float64)
    if not unbiased:
        return total / len(x) ** 2
    return (total - matrix.diagonal().sum(dtype=torch.float64)) / (len(x) * (len(x) - 1))


def _sum_of_part(x: Tensor, part: _Part) -> Tensor:
    """Σ_ij k(x_i, y_j) over one part of y; [] float64."""
    return part(x).sum(dtype=torch.float64)


def _across(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """The mean of k(x_i, y_j); [] float64."""
    return kernel(x, y).sum(dtype=torch.float64) / (len(x) * len(y))


def mean_of_all_pairs(y: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    """`mean_within` of a set of any size: blocks in float64, each pair of blocks once since k(x, y) = k(y, x)."""
    with torch.no_grad():
        total = torch.zeros((), dtype=torch.float64, device=y.device)
        parts = torch.split(y, _CONSTANT_BLOCK)
        for index, part in enumerate(parts):
            rows = part.double()
            matrix = kernel(rows, rows)
            total += matrix.sum() - (matrix.diagonal().sum() if unbiased else 0)
            for other in parts[index + 1 :]:
                total += 2 * kernel(rows, other.double()).sum()
        return total / (len(y) * (len(y) - 1 if unbiased else len(y)))
