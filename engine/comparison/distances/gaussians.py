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

from engine.comparison.distances.first_order import with_gradient
from engine.comparison.distances.kernels import check_features
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

    The real covariance is factored once, Σ* = BᵀB with B [r, F] of its r eigenvalues above F · eps of the largest, in
    float64. A call is the product [n, F] · [F, r] and the singular values of the [n, r] matrix; its gradient, another
    such product. Memory: B, a few matrices [n, r], and for the singular values five [k, k], k the smaller of n and r.

    Args:
        mean: μ* [F] of the real images' features; no gradient reaches it.
        covariance: Σ* [F, F], symmetric, without negative eigenvalues but for rounding.

    Attributes:
        mean: μ* [F] float64.
        factor: B [r, F] float64.
        trace: tr Σ*, [] float64.

    Raises:
        InputError: "mean", if it isn't [F]; "covariance", if it isn't a finite [F, F], symmetric and without an
            eigenvalue below −√eps of the largest.
    """

    def __init__(self, mean: Tensor, covariance: Tensor):
        _check_moments("mean", mean, "covariance", covariance)
        self.mean = mean.detach().double()
        matrix = covariance.detach().double()
        if not bool(matrix.isfinite().all()):
            raise InputError("covariance", "has values that are not finite")
        if float((matrix - matrix.T).abs().max()) > 1e-5 * float(matrix.abs().max()):
            raise InputError("covariance", "is not symmetric")
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        eps = torch.finfo(torch.float64).eps
        largest = float(values[-1])
        tolerance = max(eps, torch.finfo(covariance.dtype).eps) ** 0.5 * max(largest, 0.0)
        if float(values[0]) < -tolerance:
            raise InputError("covariance", f"has a negative eigenvalue ({float(values[0]):.3g})")
        kept = values > len(values) * eps * largest
        self.factor = (vectors[:, kept] * values[kept].sqrt()).T.contiguous()
        self.trace = matrix.diagonal().sum()

    @classmethod
    def of(cls, y: Tensor) -> Frechet:
        """The distance to the mean and covariance (with m − 1) of features y [m, F].

        With fewer images than features Σ* isn't formed: B is the centred features over √(m − 1).

        Raises:
            InputError: "y", if it isn't [m ≥ 2, F].
        """
        check_features("y", y, at_least=2)
        y = y.detach()
        mean = y.mean(dim=0, dtype=torch.float64)
        if len(y) > y.shape[1]:
            covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=y.device)
            for rows in torch.split(y, _BLOCK):
                centred = rows.double() - mean
                covariance.addmm_(centred.T, centred)
            return cls(mean, covariance / (len(y) - 1))
        bound = cls.__new__(cls)
        bound.mean, bound.factor = _mean_and_factor(y)
        bound.trace = bound.factor.square().sum()
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

        with q̄ the mean row of Q, since A is centred. A is made again, a block of rows at a time: of numbers [n, F] in
        float64 there are none.
        """
        scale = (len(x) - 1) ** -0.5
        mean = torch.stack([rows.double().sum(dim=0) for rows in torch.split(x, _BLOCK)]).sum(dim=0) / len(x)

        def factors() -> Iterator[tuple[slice, Tensor]]:
            for start in range(0, len(x), _BLOCK):
                part = slice(start, min(start + _BLOCK, len(x)))
                yield part, (x[part].double() - mean).mul_(scale)

        product = self.factor.new_empty(len(x), len(self.factor))
        value = (mean - self.mean).square().sum() + self.trace
        for part, rows in factors():
            torch.mm(rows, self.factor.T, out=product[part])
            value = value + torch.linalg.vector_norm(rows).square()
        total, polar = _nuclear_norm(product)
        value = value - 2 * total
        if not wanted:
            return value, None
        polar -= polar.mean(dim=0)
        gradient = torch.empty_like(x, dtype=_wide(x))
        for part, rows in factors():
            rows.addmm_(polar[part], self.factor, alpha=-1).mul_(2 * scale)
            gradient[part] = rows.add_(mean - self.mean, alpha=2 / len(x))
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
        wide = covariance.double()
        product = self.factor @ ((wide + wide.T) / 2) @ self.factor.T
        means = (mean.double() - self.mean).square().sum()
        found = means + wide.diagonal().sum() + self.trace - 2 * _trace_of_symmetric_root(product)
        return found.to(_wide(covariance))


def _wide(x: Tensor) -> torch.dtype:
    """The result's dtype: x's, or float32 if that has fewer digits."""
    return torch.promote_types(x.dtype, torch.float32)


def _mean_and_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """μ [F] of x [n, F] and A [n, F] with AᵀA = Σ (with n − 1), both float64."""
    x = x.double()
    mean = x.mean(dim=0)
    return mean, (x - mean) / (len(x) - 1) ** 0.5


def _trace_of_root(product: Tensor) -> Tensor:
    """The sum of the singular values of A Bᵀ [n, m], which is tr (B AᵀA Bᵀ)^½; its gradient is U Vᵀ."""
    with torch.no_grad():
        total, polar = _nuclear_norm(product)
    return with_gradient(product, total, polar)


def _nuclear_norm(product: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the singular values, [], and U Vᵀ of those that are not 0; NaN of values that are not finite."""
    try:
        left, values, right = torch.linalg.svd(product, full_matrices=False)
    except torch.linalg.LinAlgError:
        if bool(product.isfinite().all()):
            raise
        return product.sum() * torch.nan, product * torch.nan  # as other distances of such features
    kept = values > max(product.shape) * torch.finfo(product.dtype).eps * values[:1]
    return values.sum(), left.mul_(kept) @ right


def _trace_of_symmetric_root(product: Tensor) -> Tensor:
    """tr M^½ of a symmetric M [r, r] without negative eigenvalues; its gradient is ½ M^−½."""
    with torch.no_grad():
        try:
            values, vectors = torch.linalg.eigh((product + product.T) / 2)
        except torch.linalg.LinAlgError:
            if bool(product.isfinite().all()):
                raise
            return product.sum() * torch.nan
        kept = values > len(values) * torch.finfo(product.dtype).eps * values[-1:]
        roots = torch.where(kept, values, 0.0).sqrt()
        inverse = (vectors * torch.where(kept, 0.5 / torch.where(kept, roots, 1.0), 0.0)) @ vectors.T
    return with_gradient(product, roots.sum(), inverse)


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
