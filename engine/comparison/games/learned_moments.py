"""Learned moments: the generator matches averages of what a network of its own, trained for it, sees in images.

Φ(x) is all that a network D finds in an image: its activations, and the gradient of its output with respect to its
weights. Source: Ravuri et al. 2018, "Learning implicit generative models with the method of learned moments" (ICML,
arXiv 1806.11006).
"""

from __future__ import annotations

from torch import Tensor

from engine.comparison.games.outputs import wide
from engine.support.errors import InputError


def moment_distance(real: Tensor, fake: Tensor) -> Tensor:
    """½‖E Φ(x) − E Φ(G)‖², as []: what the generator minimises.

    Its gradient with respect to E Φ(G) is E Φ(G) − E Φ(x).

    Args:
        real, fake: E Φ(x) and E Φ(G), [K].

    Raises:
        InputError: "real", if it isn't [K]; "fake", if it isn't of the same shape.
    """
    if real.dim() != 1:
        raise InputError("real", f"expected [K], got {list(real.shape)}")
    if fake.shape != real.shape:
        raise InputError("fake", f"expected {list(real.shape)} as real, got {list(fake.shape)}")
    return (wide(real) - wide(fake)).square().sum() / 2


def norm_penalty(gradient: Tensor, weight: float) -> Tensor:
    """λ(‖g‖² − 1)², as []: what keeps the weights' gradient g = E ∇_w D(x) at real images of length 1.

    Without it, moments could differ by as much as is wanted through their scale alone. The paper penalises this norm;
    that it is one of the mean gradient of a minibatch, and quadratic, is this engine's choice.

    Args:
        gradient: g [K].
        weight: λ.

    Raises:
        InputError: "gradient", if it isn't [K].
    """
    if gradient.dim() != 1:
        raise InputError("gradient", f"expected [K], got {list(gradient.shape)}")
    return weight * (wide(gradient).square().sum() - 1).square()
