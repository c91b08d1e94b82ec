"""Drifting: generated features are pulled to real ones and pushed away from one another, by a field of both."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from engine.comparison.distances.kernels import check_features, distances, full_precision
from engine.support.errors import InputError

_LEAST_SCALE = 1e-3  # of distances, as the authors' code has it: features all in one place have no scale
_LEAST_FORCE = 1e-8  # mean square


def drifting(
    x: Tensor, y: Tensor, temperatures: Iterable[float] = (0.02, 0.05, 0.2), affinity_floor: float = 1e-6
) -> Tensor:
    """MSE(g, sg(g + V)) of generated features x [n, F] and real ones y [m, F], as [].

    With t the n + m rows of x and y, s = the mean of ‖x_i − t_j‖ over all of them, and g = x √F / s:

        logit_ij = −‖x_i − t_j‖ / (s τ), and −∞ for x_i itself
        A = √ max(softmax over j · softmax over i, floor)
        V^τ_i = Σ_jk A_ij A_ik (t_j − t_k) √F / s over real j and generated k
        V = Σ_τ V^τ / √(mean of (V^τ)² over n and F)
        loss = 1/(nF) Σ (g − sg(g + V))²

    The value is the mean of V², which says little: each temperature's field has mean square 1. It falls to the floor of
    its normalisation, 1e-8, only where the field does. The gradient is −2 V √F / (s n F), towards V; y and s have none.
    A second derivative sees the goal g + V as the constant that it is.

    Source: Deng et al. 2026 (arXiv 2602.04770). Follows the code of the authors, whose logits have 100 added for x_i
    itself, and which has the floors. Class labels, guidance and further negatives are not here. In x's dtype (float32
    for half precision). Cost: one product [n, F] · [F, n + m]; for each temperature a few passes over [n, n + m] and
    one product [n, n + m] · [n + m, F].

    Args:
        x: features [n, F] of generated images.
        y: features [m, F] of real images; no gradient reaches them.
        temperatures: τ, in multiples of the mean distance.
        affinity_floor: of A². 0 is the paper's Algorithm 2.

    Raises:
        InputError: "x", if it isn't [n ≥ 2, F]; "y", if it isn't [m, F] with x's F; "temperatures", if there are none
            or one isn't positive and finite; "affinity_floor", if it is negative.
    """
    check_features("x", x, at_least=2)
    check_features("y", y, size=x.shape[1])
    chosen = tuple(temperatures)
    if not chosen:
        raise InputError("temperatures", "expected at least one number, got none")
    for temperature in chosen:
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError("temperatures", f"must be positive and finite, got {temperature}")
    if not 0 <= affinity_floor < 1:
        raise InputError("affinity_floor", f"must be at least 0 and below 1, got {affinity_floor}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.no_grad(), full_precision(x):
        field, unit = _field(wide.detach(), y.to(wide.dtype), chosen, affinity_floor)
    # x − sg(x) first: the field would lose digits beside features that lie far from the origin.
    return ((wide - wide.detach()) / unit - field).square().mean()


def _field(x: Tensor, y: Tensor, temperatures: Iterable[float], floor: float) -> tuple[Tensor, Tensor]:
    """V [n, F], and the unit s/√F [] that features are divided by."""
    targets = torch.cat([x, y])
    apart = distances(x, targets)
    apart.diagonal().zero_()
    scale = apart.mean()
    unit = (scale / math.sqrt(x.shape[1])).clamp_min(_LEAST_SCALE)
    places = (targets - targets.mean(dim=0)) / unit  # the weights of a row sum to 0: any shift will do
    apart = apart / scale.clamp_min(_LEAST_SCALE)
    apart.fill_diagonal_(math.inf)
    field = torch.zeros_like(x)
    for temperature in temperatures:
        logits = -apart / temperature
        affinity = (logits.softmax(dim=1) * logits.softmax(dim=0)).clamp_min(floor).sqrt()
        generated, real = affinity[:, : len(x)], affinity[:, len(x) :]
        attraction = real * generated.sum(dim=1, keepdim=True)
        repulsion = generated * real.sum(dim=1, keepdim=True)
        force = torch.cat([-repulsion, attraction], dim=1) @ places
        field += force / force.square().mean().clamp_min(_LEAST_FORCE).sqrt()
    return field, unit
