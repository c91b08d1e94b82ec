"""Fisher GAN: the difference of the critic's means in units of its own deviation.

Source: Mroueh & Sercu 2017 (arXiv 1705.09675), equation 9 and algorithm 1, and their code. The critic's side maximises
over the critic and *minimises* over Λ: Λ grows while Ω is above 1, which then weighs (1 − Ω) more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.comparison.games.adversarial import wasserstein_generator
from engine.comparison.games.outputs import check_positive, checked
from engine.comparison.games.protocols import Stateful


def fisher_moment(real: Tensor, fake: Tensor) -> Tensor:
    """Ω = ½ E f(x)² + ½ E f(G)², as []; the critic is held to Ω = 1.

    Args:
        real: outputs f [n, 1] of real images.
        fake: outputs f [m, 1] of generated images.

    Raises:
        InputError: "real" or "fake", if it has another shape; so does every function here.
    """
    real, fake = checked(real, fake, 1)
    return (real.square().mean() + fake.square().mean()) / 2


def fisher_critic(real: Tensor, fake: Tensor, multiplier: float | Tensor, rho: float) -> Tensor:
    """−[E f(x) − E f(G) + Λ (1 − Ω) − ρ/2 (1 − Ω)²], as []: minus the augmented Lagrangian (equation 9).

    Args:
        real: outputs f [n, 1] of real images.
        fake: outputs f [m, 1] of generated images.
        multiplier: Λ; no gradient reaches it.
        rho: ρ, the weight of the squared violation.
    """
    slack = 1 - fisher_moment(real, fake)
    real, fake = checked(real, fake, 1)
    if isinstance(multiplier, Tensor):
        multiplier = multiplier.detach().to(real)
    return fake.mean() - real.mean() - multiplier * slack + rho / 2 * slack.square()


def fisher_distance(real: Tensor, fake: Tensor) -> Tensor:
    """(E f(x) − E f(G)) / √Ω, as []: what the critic estimates of the Fisher distance; 0 if f is 0.

    Its maximum over all critics is √ Σ (p − q)² / ((p + q)/2), the square root of a χ² distance of real p and
    generated q (theorem 1).
    """
    omega = fisher_moment(real, fake)
    real, fake = checked(real, fake, 1)
    return (real.mean() - fake.mean()) / omega.clamp_min(torch.finfo(omega.dtype).tiny).sqrt()


class Fisher(Stateful):
    """The game of Fisher GAN: the critic's loss is `fisher_critic`, the generator's −E f(G).

        Λ ← Λ − ρ (1 − Ω)        from Λ = 0, after each critic step, with Ω of the outputs that the step was made from

    Args:
        rho: ρ, both the penalty's weight and Λ's rate.

    Attributes:
        multiplier: Λ, [] float64.

    Raises:
        InputError: "rho", if it isn't positive and finite.
    """

    multiplier: Tensor

    def __init__(self, rho: float = 1e-6):
        super().__init__()
        check_positive("rho", rho)
        self.rho = rho
        self.keep("multiplier", 0.0)

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """See `fisher_critic`."""
        return fisher_critic(real, fake, self.multiplier.clone(), self.rho)  # update_ may come before backward

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """−E f(G), as []; Ω isn't the generator's business (algorithm 1)."""
        return wasserstein_generator(fake)

    @torch.no_grad()
    def update_(self, real: Tensor, fake: Tensor) -> None:
        """One step of Λ."""
        slack = 1 - fisher_moment(real, fake)
        self.multiplier.sub_(slack.to(self.multiplier), alpha=self.rho)

    @torch.no_grad()
    def figures(self, real: Tensor, fake: Tensor, loss: Tensor) -> Mapping[str, Tensor]:
        """As "distance", see `fisher_distance`; "moment": Ω; "multiplier": Λ."""
        return {
            "distance": fisher_distance(real, fake),
            "moment": fisher_moment(real, fake),
            "multiplier": self.multiplier.clone(),
        }
