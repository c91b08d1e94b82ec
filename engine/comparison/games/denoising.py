"""Denoising feature matching: the generator moves its features to where a denoiser of real features would put them.

With Φ a critic's features and r a denoiser that was trained on real ones with Gaussian noise of deviation σ added,
(r(h) − h)/σ² estimates ∂ log p(h)/∂h, p the density of real features with that noise (Alain & Bengio 2014). So a step
towards r(Φ(G)) climbs the density.

Source: Warde-Farley & Bengio 2017, "Improving generative adversarial networks with denoising feature matching" (ICLR).
"""

from __future__ import annotations

from torch import Tensor

from engine.comparison.distances.kernels import check_features
from engine.comparison.games.adversarial import nonsaturating_generator
from engine.comparison.games.outputs import wide
from engine.support.errors import InputError


def denoising_error(features: Tensor, denoised: Tensor) -> Tensor:
    """‖Φ − r‖²/h of every image, as [n].

    Its mean over real images with r = r(Φ(x) + noise) is what the denoiser minimises; over generated ones with
    r = r(Φ(G)), taken as it is, what the generator does. The division by h makes the paper's weight, 0.03/h, one that
    does not depend on the critic's width.

    Args:
        features: Φ [n, h].
        denoised: r [n, h].

    Raises:
        InputError: "features", if it isn't [n ≥ 1, h]; "denoised", if it isn't of the same shape.
    """
    check_features("features", features)
    if denoised.shape != features.shape:
        raise InputError("denoised", f"expected {list(features.shape)} as features, got {list(denoised.shape)}")
    return (wide(features) - wide(denoised)).square().mean(dim=1)


def denoising_generator(fake: Tensor, errors: Tensor, *, adversarial: float, denoising: float) -> Tensor:
    """λ_a E softplus(−g) + λ_d E ‖Φ(G) − r(Φ(G))‖²/h, as [] (equation 7 of the source).

    Args:
        fake: the critic's outputs g [m, 1] of generated images.
        errors: `denoising_error` [m] of the same.
        adversarial, denoising: λ_a and λ_d.

    Raises:
        InputError: "fake", if it isn't [m ≥ 1, 1]; "errors", if it isn't [m].
    """
    game = nonsaturating_generator(fake)
    if errors.shape != fake.shape[:1]:
        raise InputError("errors", f"expected [{len(fake)}], got {list(errors.shape)}")
    return adversarial * game + denoising * errors.to(game.dtype).mean()
