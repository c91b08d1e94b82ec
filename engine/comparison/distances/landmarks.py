"""MMD² to a set of any size by a few landmarks: Nyström's approximation of the set's mean embedding.

The real side μ_y = 1/m Σ_j k(y_j, ·) is replaced with its projection on the span of k(z_a, ·), z the landmarks:
Σ_a α_a k(z_a, ·) with α = K_ZZ⁻¹ μ̄ and μ̄_a = 1/m Σ_j k(z_a, y_j). It is computed once, of all y; a call then costs as
much as one against M images. Source: Chatalic et al. 2022; landmarks by k-means as in the iRDM paper's code.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from engine.comparison.distances.kernels import Energy, Kernel, check_features, fixed
from engine.comparison.distances.mean_embedding import mean_within
from engine.support.errors import InputError

_BLOCK = 1024  # rows of y in float64 that are compared with all landmarks at once


class LandmarkMMD:
    """MMD² to a fixed set's mean embedding on landmarks, as a function of x [n, F] alone.

        1/n² Σ_ij k(x_i, x_j) − 2/n Σ_ia k(x_i, z_a) α_a + αᵀ K_ZZ α,    α = (K_ZZ + λ k̄ 1)⁻¹ μ̄

    with λ the `ridge` and k̄ the mean of k(z_a, z_a). It is the squared distance to an element of the kernel's space,
    so never negative but for rounding; without the ridge, that element is the nearest to the set's mean embedding. With
    all of y as landmarks and no ridge it is MMD² to y. What x's images do to one another is exact.

    Computed once, in float64: m·M kernels and the solution of M equations. A call evaluates n² + n·M kernels, in x's
    dtype (float32 for half precision), their sums in float64. Differentiable as often as the kernel is.

    Energy's kernel −‖x−y‖ isn't positive definite, but −‖x−y‖ + ‖x−c‖ + ‖y−c‖ is, and has the same MMD between laws.
    For it the mean of the landmarks, c, is one more landmark, whose weight is what the others leave of 1.

    Args:
        y: features [m, F] of the real images; neither kept nor differentiated.
        kernel: k(x, y) → [n, m], positive definite, or `kernels.energy()`.
        landmarks: how many, M ≤ m, by `choose_landmarks`; or their features [M, F].
        unbiased: leave k(x_i, x_i) out, so that the mean over minibatches is the squared distance of x's law to the
            element; the real side is one element in either case.
        ridge: λ ≥ 0. Larger ones make the weights α smaller, which float32 needs: their terms cancel.
        seed: of the choice of the landmarks.

    Attributes:
        landmarks: z [M, F], in y's dtype (float32 for half precision); [M + 1, F] for energy.
        weights: α [M] float64; [M + 1] for energy.
        constant: αᵀ K_ZZ α, [] float64.

    Raises:
        InputError: "y", as for `MMD`; "landmarks", if there are none, more than images, or they don't have y's F;
            "ridge", if it is negative, or so small that the equations have no solution in float64.
    """

    def __init__(
        self,
        y: Tensor,
        kernel: Kernel,
        landmarks: int | Tensor = 4096,
        unbiased: bool = False,
        ridge: float = 1e-6,
        seed: int = 0,
    ):
        check_features("y", y)
        if not 0 <= ridge < float("inf"):
            raise InputError("ridge", f"must be at least 0 and finite, got {ridge}")
        y = y.detach()
        if isinstance(landmarks, Tensor):
            check_features("landmarks", landmarks, size=y.shape[1])
            points = landmarks.detach()
        else:
            points = choose_landmarks(y, landmarks, seed)
        with torch.no_grad():
            if isinstance(kernel, Energy):
                if len(points) < 2:
                    raise InputError("landmarks", "energy's kernel needs at least 2")
                points = torch.cat([points, points.mean(dim=0, keepdim=True)])
            points = points.to(torch.promote_types(y.dtype, torch.float32))
            rows = points.double()
            inner, towards = kernel(rows, rows), _mean_towards(rows, y, kernel)
            solve = _energy_weights if isinstance(kernel, Energy) else _solve
            self._bind(points, solve(inner, towards, ridge), inner, kernel, unbiased)

    @classmethod
    def of_weights(cls, landmarks: Tensor, weights: Tensor, kernel: Kernel, unbiased: bool = False) -> LandmarkMMD:
        """The distance to Σ_a α_a k(z_a, ·) of landmarks z [M, F] and weights α [M], such as another one's attributes.

        Raises:
            InputError: "landmarks", if it isn't [M, F]; "weights", if it isn't [M].
        """
        check_features("landmarks", landmarks)
        if weights.shape != landmarks.shape[:1] or not weights.is_floating_point():
            raise InputError(
                "weights", f"expected real weights [{len(landmarks)}], got {list(weights.shape)} {weights.dtype}"
            )
        bound = cls.__new__(cls)
        points = landmarks.detach().to(torch.promote_types(landmarks.dtype, torch.float32))
        with torch.no_grad():
            bound._bind(points, weights.detach().double(), kernel(points.double(), points.double()), kernel, unbiased)
        return bound

    def _bind(self, points: Tensor, weights: Tensor, inner: Tensor, kernel: Kernel, unbiased: bool) -> None:
        self.kernel, self.unbiased, self.size = kernel, unbiased, points.shape[1]
        self.landmarks, self.weights = points, weights
        self.constant = weights @ inner @ weights
        self._kernel_of_landmarks = fixed(kernel, points, points.mean(dim=0))

    def __call__(self, x: Tensor) -> Tensor:
        """The squared distance of x [n, F], as [].

        Raises:
            InputError: "x", if it isn't [n, F] with y's F and at least one row, or two if unbiased.
        """
        check_features("x", x, at_least=2 if self.unbiased else 1, size=self.size)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        attraction = (self._kernel_of_landmarks(x).sum(dim=0, dtype=torch.float64) @ self.weights) / len(x)
        return (mean_within(x, self.kernel, self.unbiased) - 2 * attraction + self.constant).to(x.dtype)


def choose_landmarks(y: Tensor, count: int, seed: int = 0, iterations: int = 20, limit: int = 200_000) -> Tensor:
    """`count` centres [count, F] of features y [m, F] by k-means, in y's dtype (float32 for half precision).

    scikit-learn's `KMeans`: k-means++ (Arthur & Vassilvitskii 2007), then at most `iterations` of Lloyd's. The same for
    the same y and seed on the same machine. With more than `limit` rows, of that many of them, drawn by the seed. With
    `count` = m they are y itself; fewer than `count` where y has fewer distinct rows. Cost: about 10 + `iterations`
    products of [m, F] and [F, count], on the CPU.

    Raises:
        InputError: "y", if it isn't [m, F]; "landmarks", if there are none or more than images; "limit", if it is below
            `count`; "iterations", if it is below 1.
    """
    check_features("y", y)
    if not 1 <= count <= len(y):
        raise InputError("landmarks", f"must be from 1 to the number of images, {len(y)}; got {count}")
    if limit < count:
        raise InputError("limit", f"must be at least the number of landmarks, {count}; got {limit}")
    if iterations < 1:
        raise InputError("iterations", f"must be at least 1, got {iterations}")
    rows = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    if count == len(rows):
        return rows
    if len(rows) > limit:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:limit]
        rows = rows[chosen.sort().values.to(rows.device)]
    # Imported here: it takes longer than all else that a training imports.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    means = KMeans(count, n_init=1, max_iter=iterations, random_state=seed % 2**32)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ConvergenceWarning)
        centres = torch.from_numpy(means.fit(rows.cpu().numpy()).cluster_centers_)
    if any(issubclass(one.category, ConvergenceWarning) for one in found):  # fewer distinct rows than centres
        centres = torch.unique(centres, dim=0)
    return centres.to(rows)


def _mean_towards(points: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """μ̄_a = 1/m Σ_j k(z_a, y_j), [M] float64."""
    total = points.new_zeros(len(points))
    for rows in torch.split(y, _BLOCK):
        total += kernel(points, rows.double()).sum(dim=1)
    return total / len(y)


def _solve(inner: Tensor, towards: Tensor, ridge: float) -> Tensor:
    """(K + λ k̄ 1)⁻¹ μ̄, [M] float64."""
    diagonal = inner.diagonal()
    factor, failed = torch.linalg.cholesky_ex(inner + torch.diag(torch.full_like(diagonal, ridge) * diagonal.mean()))
    pivots = factor.diagonal().square()
    if bool(failed) or bool(pivots.min() < len(pivots) * torch.finfo(pivots.dtype).eps * pivots.max()):
        raise InputError(
            "ridge", f"{ridge:g} leaves the landmarks' kernel matrix singular; give a larger one, or fewer landmarks"
        )
    return torch.cholesky_solve(towards[:, None], factor)[:, 0]


def _energy_weights(inner: Tensor, towards: Tensor, ridge: float) -> Tensor:
    """The weights of all landmarks, the last of them the point c, for k(x, y) = −‖x−y‖; they sum to 1."""
    of_centre = inner[-1]
    shifted = (inner - of_centre[:, None] - of_centre[None, :])[:-1, :-1]
    weights = _solve(shifted, (towards - of_centre - towards[-1])[:-1], ridge)
    return torch.cat([weights, 1 - weights.sum(dim=0, keepdim=True)])
