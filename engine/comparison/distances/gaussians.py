"""The Fréchet distance: the squared 2-Wasserstein distance of the Gaussians that have two sets' means and covariances.

The trace of (Σ*^½ Σ Σ*^½)^½ is the sum of the singular values of A Bᵀ, for any A and B with AᵀA = Σ and BᵀB = Σ*. With
A the centred features over √(n−1), [n, F], nothing of size [F, F] is needed, singular covariances (n ≤ F) are the usual
case, and no eigenvalue is squared first. The gradient of that sum is U Vᵀ of the singular vectors: no gaps between
singular values divide it, and none of them does.

All of it is in float64, whatever the features are in. Source: Dowson & Landau 1982; Heusel et al. 2017 (FID).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.comparison.distances.factors import Factor
from engine.comparison.distances.first_order import with_gradient
from engine.comparison.distances.kernels import check_features
from engine.comparison.distances.polar import nuclear_norm_
from engine.support.errors import InputError

_BLOCK = 512  # rows in float64 at once


def frechet(x: Tensor, y: Tensor) -> Tensor:
    """The Fréchet distance of features x [n, F] and y [m, F], as [].

        ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ'^½ Σ Σ'^½)^½),    Σ with n − 1, Σ' with m − 1

    Never negative but for rounding, and 0 if both sets have the same mean and covariance. The square is not rooted, as
    in FID. Fewer images than features bias it upwards; see `Frechet` for a whole data set's moments.

    Differentiable once in x and y. Where the distance has a corner (a direction in which one set varies and the other
    does not at all), the gradient is the subgradient that leaves that direction of A Bᵀ (see the module) out: singular
    values below max(n, m) · eps of the largest count as 0. Cost: the product [n, F] · [F, m], and the singular values
    of the [n, m] matrix.

    Raises:
        InputError: "x" or "y", if it isn't [n ≥ 2, F]; "y", if its F isn't x's.
    """
    check_features("x", x, at_least=2)
    check_features("y", y, at_least=2, size=x.shape[1])
    mean, factor = _mean_and_factor(x)
    other_mean, other_factor = _mean_and_factor(y)
    means = (mean - other_mean).square().sum()
    found = means + factor.square().sum() + other_factor.square().sum() - 2 * _trace_of_root(factor @ other_factor.T)
    return found.to(_wide(x))


def frechet_of_moments(mean: Tensor, covariance: Tensor, real_mean: Tensor, real_covariance: Tensor) -> Tensor:
    """The Fréchet distance of two Gaussians by their means [F] and covariances [F, F], as [].

    ‖μ − μ*‖² + tr(Σ + Σ* − 2 (Σ*^½ Σ Σ*^½)^½)

    Differentiable once in `mean` and `covariance`; the real side is a constant. To compare with the same one again and
    again, make a `Frechet` of it and call `of_moments`, which says more about the gradient.

    Raises:
        InputError: "mean", "covariance", "real_mean" or "real_covariance", as for `Frechet`.
    """
    _check_moments("real_mean", real_mean, "real_covariance", real_covariance)
    return Frechet(real_mean, real_covariance).of_moments(mean, covariance)


class Frechet:
    """The Fréchet distance to a fixed mean and covariance: `frechet` as a function of x alone.

    The real covariance is factored once, Σ* = BᵀB with B [r, F] upper trapezoidal, in float64. A call is the product
    [n, F] · [F, r] and the singular values of the [n, r] matrix; its gradient, another such product. Memory: the half
    of B that isn't 0, the [n, r] matrix, and for the singular values four matrices [k, k], k the smaller of n and r.

    Args:
        mean: μ* [F] of the real images' features; no gradient reaches it.
        covariance: Σ* [F, F], symmetric, without negative eigenvalues but for rounding. Nothing else of this size is
            made, unless it has such eigenvalues.
        scales: [F], what all features, the real ones and x, are multiplied by before they are compared.
        images: if given, `covariance` is Σ (y − μ*)(y − μ*)ᵀ over so many images, still to be divided by one less.

    Attributes:
        mean: μ* [F] float64; it, Σ*, factor and trace are of the scaled features.
        factor: B.
        trace: tr Σ*, [] float64.
        scales: as given.

    Raises:
        InputError: "mean", if it isn't [F]; "covariance", if it isn't a finite [F, F], symmetric and without an
            eigenvalue below −√eps of the largest.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, scales: Tensor | None = None, *, images: int | None = None):
        _check_moments("mean", mean, "covariance", covariance)
        matrix, size, self.scales = covariance.detach(), len(mean), scales
        wide = matrix.new_ones(size, dtype=torch.float64) if scales is None else scales.detach().double()
        self.mean = mean.detach().double() * wide
        _check_symmetric(matrix)
        share = 1.0 if images is None else 1 / (images - 1)

        def rows(part: slice) -> Tensor:
            found = (matrix[part].double() + matrix[:, part].T).mul_(0.5 * share)
            return found.mul_(wide).mul_(wide[part, None])

        self.trace = (matrix.diagonal().double() * wide.square()).sum() * share
        self.factor = Factor.of_covariance(rows, size) or _factor_without_negative(
            rows(slice(0, size)), covariance.dtype
        )

    @classmethod
    def of(cls, y: Tensor, scales: Tensor | None = None) -> Frechet:
        """The distance to the mean and covariance (with m − 1) of features y [m, F]; `scales` as for the class.

        With fewer images than features Σ* isn't formed: B is made of the centred features over √(m − 1).

        Raises:
            InputError: "y", if it isn't [m ≥ 2, F].
        """
        check_features("y", y, at_least=2)
        (count, size), y = y.shape, y.detach()

        if count > size:
            mean = _mean(y, None)
            m2 = torch.zeros(size, size, dtype=torch.float64, device=y.device)
            for _, rows in _blocks(y, None):
                centred = rows - mean
                m2.addmm_(centred.T, centred)
            return cls(mean, m2, scales, images=count)
        mean = _mean(y, scales)
        matrix = mean.new_empty(size, count).T  # column-major, as LAPACK has it
        for part, rows in _blocks(y, scales):
            matrix[part] = (rows - mean).mul_((count - 1) ** -0.5)
        bound = cls.__new__(cls)
        bound.mean, bound.trace, bound.scales = mean, torch.linalg.vector_norm(matrix).square(), scales
        bound.factor = Factor.of_rows(matrix)
        return bound

    def __call__(self, x: Tensor) -> Tensor:
        """The distance of x [n, F], as []; differentiable once, as `frechet` is.

        Raises:
            InputError: "x", if it isn't [n ≥ 2, F] with the mean's F.
        """
        check_features("x", x, at_least=2, size=len(self.mean))
        wanted = x.requires_grad and torch.is_grad_enabled()
        with torch.no_grad():
            value, gradient = self._of_sample(x, wanted)
        return (value if gradient is None else with_gradient(x, value, gradient)).to(_wide(x))

    def _of_sample(self, x: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """The distance, float64, and its gradient [n, F] in the result's dtype, if `wanted`.

            ∂/∂x = 2/n (μ − μ*) + 2/√(n−1) (A − (Q − q̄) B),    Q = U Vᵀ of A Bᵀ

        times the scales, with q̄ the mean row of Q, since A is centred. A is made again, a block of rows at a time: of
        numbers [n, F] in float64 there are none.
        """
        scale = (len(x) - 1) ** -0.5
        mean = _mean(x, self.scales)

        def factors() -> Iterator[tuple[slice, Tensor]]:
            for part, rows in _blocks(x, self.scales):
                yield part, (rows - mean).mul_(scale)

        product = mean.new_empty(len(x), self.factor.rank)
        value = (mean - self.mean).square().sum() + self.trace
        for part, rows in factors():
            self.factor.project(rows, out=product[part])
            value = value + torch.linalg.vector_norm(rows).square()
        value = value - 2 * nuclear_norm_(product)
        if not wanted:
            return value, None
        polar = product
        polar -= polar.mean(dim=0)
        gradient = torch.empty_like(x, dtype=_wide(x))
        for part, rows in factors():
            rows.sub_(self.factor.lift(polar[part])).mul_(2 * scale)
            rows.add_(mean - self.mean, alpha=2 / len(x))
            gradient[part] = rows if self.scales is None else rows.mul_(self.scales)
        return value, gradient

    def of_moments(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """The distance of a population's mean [F] and covariance [F, F], as []; differentiable once in both.

        For running moments with the gradient through the newest minibatch: Σ = E xxᵀ − μμᵀ. The covariance counts as
        its symmetric part. ∂/∂Σ = 1 − Bᵀ (B Σ Bᵀ)^−½ B, by the eigenvalues of B Σ Bᵀ [r, r]: those below r · eps of
        the largest count as 0, in the value and in the root's inverse, so that a singular population has a finite
        gradient.

        Raises:
            InputError: "mean" or "covariance", if it isn't [F] or [F, F] with the real mean's F.
        """
        _check_moments("mean", mean, "covariance", covariance, len(self.mean))
        dtype = _wide(covariance)
        if self.scales is not None:
            scales = self.scales.double()
            mean, covariance = mean * scales, covariance * scales * scales[:, None]
        means = (mean.double() - self.mean).square().sum()
        found = means + covariance.diagonal().double().sum() + self.trace - 2 * self._trace_of_root(covariance)
        return found.to(dtype)

    def _trace_of_root(self, covariance: Tensor) -> Tensor:
        """tr (B Σ Bᵀ)^½, with its gradient ½ Bᵀ (B Σ Bᵀ)^−½ B."""
        wide, factor = covariance.detach().double(), self.factor
        with torch.no_grad():
            half = factor.project((wide + wide.T) / 2, wide.new_empty(factor.size, factor.rank))
            product = factor.project(half.T, wide.new_empty(factor.rank, factor.rank))
            total, inverse = _trace_of_symmetric_root(product)
            gradient = factor.lift(factor.lift(inverse).T)
        return with_gradient(covariance, total, gradient)


def _wide(x: Tensor) -> torch.dtype:
    """The result's dtype: x's, or float32 if that has fewer digits."""
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(x: Tensor, scales: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x [n, F] · scales, some at a time, and where they are; as float64, perhaps the memory of x."""
    for start in range(0, len(x), _BLOCK):
        part = slice(start, min(start + _BLOCK, len(x)))
        yield part, (x[part] if scales is None else x[part] * scales).double()


def _mean(x: Tensor, scales: Tensor | None) -> Tensor:
    """[F] float64."""
    return torch.stack([rows.sum(dim=0) for _, rows in _blocks(x, scales)]).sum(dim=0) / len(x)


def _mean_and_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """μ [F] of x [n, F] and A [n, F] with AᵀA = Σ (with n − 1), both float64."""
    x = x.double()
    mean = x.mean(dim=0)
    return mean, (x - mean) / (len(x) - 1) ** 0.5


def _trace_of_root(product: Tensor) -> Tensor:
    """The sum of the singular values of A Bᵀ [n, m], which is tr (B AᵀA Bᵀ)^½; its gradient is U Vᵀ."""
    polar = product.detach().clone()
    return with_gradient(product, nuclear_norm_(polar), polar)


def _trace_of_symmetric_root(product: Tensor) -> tuple[Tensor, Tensor]:
    """tr M^½ of a symmetric M [r, r] without negative eigenvalues, and its gradient ½ M^−½; NaN if there are none."""
    try:
        values, vectors = torch.linalg.eigh((product + product.T) / 2)
    except torch.linalg.LinAlgError:  # values that are not finite, or whose eigenvalues LAPACK doesn't find
        return product.sum() * torch.nan, product * torch.nan
    kept = values > len(values) * torch.finfo(product.dtype).eps * values[-1:]
    roots = torch.where(kept, values, 0.0).sqrt()
    return roots.sum(), (vectors * torch.where(kept, 0.5 / torch.where(kept, roots, 1.0), 0.0)) @ vectors.T


def _factor_without_negative(covariance: Tensor, given: torch.dtype) -> Factor:
    """Of Σ* [F, F] float64 whose negative eigenvalues are rounding in the dtype in which it was given."""
    values, vectors = torch.linalg.eigh(covariance)
    eps = torch.finfo(torch.float64).eps
    largest = float(values[-1])
    tolerance = max(eps, torch.finfo(given).eps) ** 0.5 * max(largest, 0.0)
    if float(values[0]) < -tolerance:
        raise InputError("covariance", f"has a negative eigenvalue ({float(values[0]):.3g})")
    kept = values > len(values) * eps * largest
    return Factor.of_rows((vectors[:, kept] * values[kept].sqrt()).T)


def _check_symmetric(covariance: Tensor) -> None:
    """InputError, unless Σ* [F, F] is finite, and symmetric but for rounding. A block of rows at a time."""
    largest = asymmetry = 0.0
    for start in range(0, len(covariance), _BLOCK):
        rows, columns = covariance[start : start + _BLOCK], covariance[:, start : start + _BLOCK].T
        if not bool(rows.isfinite().all()):
            raise InputError("covariance", "has values that are not finite")
        largest = max(largest, float(rows.abs().max()))
        asymmetry = max(asymmetry, float((rows - columns).abs().max()))
    if asymmetry > 1e-5 * largest:
        raise InputError("covariance", "is not symmetric")


def _check_moments(of_mean: str, mean: Tensor, of_covariance: str, covariance: Tensor, size: int | None = None) -> None:
    """InputError that names the argument, unless they are [F] and [F, F], F = size if given."""
    if mean.dim() != 1 or not mean.is_floating_point() or len(mean) == 0 or size not in (None, len(mean)):
        wanted = "[F]" if size is None else f"[{size}]"
        raise InputError(of_mean, f"expected a real mean {wanted}, got {list(mean.shape)} {mean.dtype}")
    if covariance.shape != (len(mean), len(mean)) or not covariance.is_floating_point():
        wanted = f"[{len(mean)}, {len(mean)}]"
        raise InputError(
            of_covariance, f"expected a real covariance {wanted}, got {list(covariance.shape)} {covariance.dtype}"
        )
