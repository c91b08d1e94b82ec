"""McGAN: the critic's features φ [n, F] are to have different means, or different second moments.

Both games are in the dual form of Mroueh et al. 2017 (arXiv 1702.08398, sections 3 and 4): the best directions among
features are found in closed form from the minibatch, and the critic has no weights for them. In the primal form they
are weights: v in the unit ball of the dual norm, U and V brought back to orthonormal columns by QR after each step. Its
maximum is the same, and so is its gradient in φ there: at the best directions, a small turn of them changes nothing.

Nothing here bounds φ: weights have to be clipped, or the distance grows without end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from engine.comparison.games.outputs import checked
from engine.comparison.games.protocols import Stateless
from engine.support.errors import InputError


def mean_distance(real: Tensor, fake: Tensor, order: float = 2.0) -> Tensor:
    """‖E φ(x) − E φ(G)‖_q, as [] (section 3).

    It is the maximum of ⟨v, E φ(x) − E φ(G)⟩ over ‖v‖_p ≤ 1 with 1/p + 1/q = 1: q = 1 has p = ∞, 2 has 2, ∞ has 1.
    Differentiable where the norm is; elsewhere (q = 1: a difference of 0; q = ∞: several largest ones; q = 2: all 0)
    the gradient is a subgradient. It is 0 where the means are equal.

    Args:
        real: features [n, F] of real images.
        fake: features [m, F] of generated images.
        order: q: 1, 2 or ∞.

    Raises:
        InputError: "real", if it isn't [n ≥ 1, F]; "fake", if it isn't [m ≥ 1, F] with the same F; "order", if it is
            another number.
    """
    _check_order(order)
    real, fake = checked(real, fake)
    difference = real.mean(dim=0) - fake.mean(dim=0)
    norm: Tensor = torch.linalg.vector_norm(difference, ord=order)
    return norm


def covariance_distance(real: Tensor, fake: Tensor, components: int = 16) -> Tensor:
    """The sum of the k largest singular values of Σ_x − Σ_G, with Σ = E φφᵀ about the origin, as [] (section 4).

    It is the maximum of tr Uᵀ(Σ_x − Σ_G)V over U, V [F, k] with orthonormal columns, that is of the difference between
    real and generated images of E Σ_i ⟨u_i, φ⟩⟨v_i, φ⟩. (With second moments about the mean, it would be none of
    expectations.) The matrix is symmetric, so its singular values are its eigenvalues' magnitudes |λ_i|, and
    v_i = sign(λ_i) u_i. The gradient in the matrix is U Vᵀ, for any multiplicities among the k. Where the k-th and the
    next are equal, or 0, it is a subgradient.

    All of it is in float64, whatever the features are in. Cost: products [F, n] · [n, F], and the eigenvectors of an
    [F, F] matrix; finding them waits for a GPU. If they aren't found (LAPACK gives up now and then, on finite matrices
    too) in two tries, the distance is NaN, and so is its gradient.

    Args:
        real: features [n, F] of real images.
        fake: features [m, F] of generated images.
        components: k, at most F. With k = F no direction is left out: the distance is the nuclear norm Σ_i |λ_i|, which
            all F outputs have a part in. With a smaller k directions in which the two sets differ less don't count.

    Raises:
        InputError: "real" or "fake", as for `mean_distance`; "components", if it isn't from 1 to F.
    """
    real, fake = checked(real, fake)
    if not 1 <= components <= real.shape[1]:
        raise InputError("components", f"must be from 1 to the critic's {real.shape[1]} outputs, got {components}")
    found: Tensor = _LargestSum.apply(_second_moment(real) - _second_moment(fake), components)
    return found.to(real.dtype)


def _second_moment(features: Tensor) -> Tensor:
    """Σ [F, F] float64."""
    rows = features.double()
    return rows.T @ rows / len(rows)


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """λ [F] and Q [F, F] of the symmetric matrix Q diag(λ) Qᵀ; NaN if they aren't found."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    except torch.linalg.LinAlgError:
        pass
    try:  # the same, with rows and columns in the other order: rounding takes another way
        values, vectors = torch.linalg.eigh(matrix.flip(0, 1))
    except torch.linalg.LinAlgError:  # it says nothing of the network and the step, as a loss that is NaN does
        return torch.full_like(matrix[0], math.nan), torch.full_like(matrix, math.nan)
    return values, vectors.flip(0)


class _LargestSum(Function):
    """The sum of the k largest magnitudes of a symmetric matrix's eigenvalues; its gradient is `_Directions`."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, components: int) -> Tensor:
        # A critic that isn't finite shows in the loss; here it would be an error of LAPACK's.
        values, vectors = _eigenvectors(matrix.nan_to_num(0.0, 0.0, 0.0))
        sizes, chosen = values.abs().topk(components)
        # What is 0 but for rounding has no sign: a direction in which neither set varies has no gradient.
        counts = sizes > sizes[0] * len(values) * torch.finfo(values.dtype).eps
        weights = torch.zeros_like(values)
        weights[chosen] = values[chosen].sign() * counts
        ctx.save_for_backward(matrix, values, vectors, weights)
        found: Tensor = (matrix * ((vectors * weights) @ vectors.T)).sum()
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * _Directions.apply(*ctx.saved_tensors), None


class _Directions(Function):
    """U Vᵀ = Q diag(w) Qᵀ of a symmetric matrix Q diag(λ) Qᵀ, w the signs of the k largest λ and 0 for the others.

    A change A of the matrix changes it by Q (K ∘ QᵀAQ) Qᵀ with K_ij = (w_i − w_j)/(λ_i − λ_j), 0 where w_i = w_j
    (Daleckii & Krein 1965): equal eigenvalues on the same side divide nothing.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, values: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(values, vectors, weights)
        return (vectors * weights) @ vectors.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        values, vectors, weights = ctx.saved_tensors
        rise = weights[:, None] - weights[None, :]
        slopes = torch.where(rise == 0, 0.0, rise / (values[:, None] - values[None, :]))
        return vectors @ (slopes * (vectors.T @ upstream @ vectors)) @ vectors.T, None, None, None


@dataclass(frozen=True)
class MeanMatching(Stateless):
    """The critic maximises `mean_distance`, the generator minimises it.

    Args:
        order: q, 1, 2 or ∞.

    Raises:
        InputError: "order", if it is another number.
    """

    order: float = 2.0
    outputs = None
    reads_real = True

    def __post_init__(self) -> None:
        _check_order(self.order)

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Minus `mean_distance`."""
        return -mean_distance(real, fake, self.order)

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """`mean_distance`."""
        return mean_distance(real, fake, self.order)

    def figures(self, real: Tensor, fake: Tensor, loss: Tensor) -> Mapping[str, Tensor]:
        """As "distance", see `mean_distance`."""
        return {"distance": -loss}


@dataclass(frozen=True)
class CovarianceMatching(Stateless):
    """The critic maximises `covariance_distance`, the generator minimises it.

    Args:
        components: k, how many singular directions; at most the critic's number of outputs, which are all of them.

    Raises:
        InputError: "components", if it is below 1.
    """

    components: int = 16
    outputs = None
    reads_real = True
    of_host = True  # which finds the eigenvectors

    def __post_init__(self) -> None:
        if self.components < 1:
            raise InputError("components", f"must be at least 1, got {self.components}")

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Minus `covariance_distance`."""
        return -covariance_distance(real, fake, self.components)

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """`covariance_distance`."""
        return covariance_distance(real, fake, self.components)

    def figures(self, real: Tensor, fake: Tensor, loss: Tensor) -> Mapping[str, Tensor]:
        """As "distance", see `covariance_distance`."""
        return {"distance": -loss}


def _check_order(order: float) -> None:
    if order not in (1, 2, math.inf):
        raise InputError("order", f"must be 1, 2 or inf, got {order}")
