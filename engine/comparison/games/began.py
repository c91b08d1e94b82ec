"""BEGAN: the critic is an autoencoder, and its output ℓ [n, 1] how badly it reconstructs an image.

Source: Berthelot et al. 2017 (arXiv 1703.10717), sections 3.3 and 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.comparison.games.outputs import check_positive, checked, checked_fake
from engine.comparison.games.protocols import Stateful


def began_critic(real: Tensor, fake: Tensor, k: float | Tensor) -> Tensor:
    """E ℓ(x) − k E ℓ(G), as []: real images are to be reconstructed well, generated ones badly (section 3.4).

    Args:
        real: ℓ [n, 1] of real images.
        fake: ℓ [m, 1] of generated images.
        k: how much generated images count, from 0 to 1; no gradient reaches it.

    Raises:
        InputError: "real" or "fake", if it has another shape; so does every function here.
    """
    real, fake = checked(real, fake, 1)
    if isinstance(k, Tensor):
        k = k.detach().to(real)
    return real.mean() - k * fake.mean()


def began_generator(fake: Tensor) -> Tensor:
    """E ℓ(G), as [] (section 3.4)."""
    return checked_fake(fake).mean()


def began_balance(real: Tensor, fake: Tensor, gamma: float) -> Tensor:
    """γ E ℓ(x) − E ℓ(G), as []: 0 in the equilibrium, E ℓ(G) = γ E ℓ(x) (section 3.3)."""
    real, fake = checked(real, fake, 1)
    return gamma * real.mean() - fake.mean()


def began_convergence(real: Tensor, fake: Tensor, gamma: float) -> Tensor:
    """M = E ℓ(x) + |γ E ℓ(x) − E ℓ(G)|, as []: falls as training converges (section 3.4.1)."""
    return checked(real, fake, 1)[0].mean() + began_balance(real, fake, gamma).abs()


class Began(Stateful):
    """The game of BEGAN; k follows the balance of the two losses.

        k ← min(1, max(0, k + λ (γ E ℓ(x) − E ℓ(G))))        from k = 0, once for each critic step

    The paper takes E ℓ(G) of the generator's own minibatch here, this one that of the critic's.

    Args:
        gamma: γ, E ℓ(G) over E ℓ(x) in the equilibrium; smaller, better pictures of fewer kinds. In (0, 1].
        rate: λ of k.

    Attributes:
        k: [] float64.

    Raises:
        InputError: "gamma" or "rate", if it is out of range.
    """

    k: Tensor

    def __init__(self, gamma: float = 0.5, rate: float = 1e-3):
        super().__init__()
        check_positive("gamma", gamma, at_most=1)
        check_positive("rate", rate)
        self.gamma, self.rate = gamma, rate
        self.keep("k", 0.0)

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """See `began_critic`."""
        return began_critic(real, fake, self.k.clone())  # update_ may come before backward

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """See `began_generator`."""
        return began_generator(fake)

    @torch.no_grad()
    def update_(self, real: Tensor, fake: Tensor) -> None:
        """One step of k."""
        balance = began_balance(real, fake, self.gamma)
        self.k.add_(balance.to(self.k), alpha=self.rate).clamp_(0, 1)

    @torch.no_grad()
    def figures(self, real: Tensor, fake: Tensor, loss: Tensor) -> Mapping[str, Tensor]:
        """As "distance", M, see `began_convergence`; "k"."""
        return {"distance": began_convergence(real, fake, self.gamma), "k": self.k.clone()}
