"""The games of critics with one output an image: is it real?

With x the outputs of real images [n, 1], g those of generated ones [m, 1], softplus(t) = log(1 + eᵗ) and the critic's
probability D = 1/(1 + e⁻ᵗ) of an output t:

| game              | the critic minimises            | the generator minimises |
| ----------------- | ------------------------------- | ----------------------- |
| minimax           | E softplus(−x) + E softplus(g)  | −E softplus(g)          |
| non-saturating    | the same                        | E softplus(−g)          |
| boundary-seeking  | the same                        | ½ E g²                  |
| least squares     | ½ E (x − 1)² + ½ E g²           | ½ E (g − 1)²            |
| hinge             | E max(0, 1−x) + E max(0, 1+g)   | −E g                    |
| Wasserstein       | E g − E x                       | −E g                    |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import relu, softplus

from engine.comparison.games.outputs import checked, checked_fake
from engine.comparison.games.protocols import Stateless


def minimax_critic(real: Tensor, fake: Tensor) -> Tensor:
    """−E log D(x) − E log(1 − D(G)) = E softplus(−x) + E softplus(g), as [].

    Its minimum over all critics is 2 log 2 − 2 JS, with JS the Jensen-Shannon divergence of real and generated images.
    Source: Goodfellow et al. 2014 (arXiv 1406.2661), equation 1.

    Args:
        real: outputs [n, 1] of real images, the logits of D.
        fake: outputs [m, 1] of generated images.

    Raises:
        InputError: "real" or "fake", if it has another shape; so does every function here.
    """
    real, fake = checked(real, fake, 1)
    return softplus(-real).mean() + softplus(fake).mean()


def minimax_generator(fake: Tensor) -> Tensor:
    """E log(1 − D(G)) = −E softplus(g), as []; its gradient fades where the critic is sure (Goodfellow 2014, eq. 1)."""
    return -softplus(checked_fake(fake)).mean()


def nonsaturating_generator(fake: Tensor) -> Tensor:
    """−E log D(G) = E softplus(−g), as [] (Goodfellow et al. 2014, section 3); the critic's loss is minimax's."""
    return softplus(-checked_fake(fake)).mean()


def boundary_seeking_generator(fake: Tensor) -> Tensor:
    """½ E (log D(G) − log(1 − D(G)))² = ½ E g², as []; the critic's loss is minimax's.

    It is least on the critic's boundary, D = ½. Source: Hjelm et al. 2018 (arXiv 1702.08431), for continuous images.
    """
    return checked_fake(fake).square().mean() / 2


def least_squares_critic(real: Tensor, fake: Tensor) -> Tensor:
    """½ E (x − 1)² + ½ E g², as []; the output itself is D. Source: Mao et al. 2017 (arXiv 1611.04076), equation 9."""
    real, fake = checked(real, fake, 1)
    return ((real - 1).square().mean() + fake.square().mean()) / 2


def least_squares_generator(fake: Tensor) -> Tensor:
    """½ E (g − 1)², as [] (Mao et al. 2017, equation 9)."""
    return (checked_fake(fake) - 1).square().mean() / 2


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 − x) + E max(0, 1 + g), as [].

    Its minimum over all critics is 2 − 2 TV, with TV the total variation. Where an output is at its margin, ±1, the
    gradient is 0. Source: Miyato et al. 2018 (SN-GAN, arXiv 1802.05957), equation 16; Lim & Ye 2017 (Geometric GAN).
    """
    real, fake = checked(real, fake, 1)
    return relu(1 - real).mean() + relu(1 + fake).mean()


def wasserstein_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E g − E x, as [].

    Its least value over all critics with slopes of at most 1 is minus the Wasserstein-1 distance; something else must
    bound the slopes. Source: Arjovsky et al. 2017 (arXiv 1701.07875), equation 2 and algorithm 1.
    """
    real, fake = checked(real, fake, 1)
    return fake.mean() - real.mean()


def wasserstein_generator(fake: Tensor) -> Tensor:
    """−E g, as []: of the Wasserstein game, and of the hinge game (Miyato et al. 2018, equation 17)."""
    return -checked_fake(fake).mean()


@dataclass(frozen=True)
class Scalar(Stateless):
    """A game of one output an image in which the generator looks at its own images alone.

    Args:
        critic: the critic's loss of outputs [n, 1] and [m, 1].
        generator: the generator's loss of outputs [m, 1].
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the critic minimises, []."""
        return self.critic(real, fake)

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the generator minimises, []; `real` isn't looked at."""
        return self.generator(fake)


def minimax() -> Scalar:
    """See `minimax_critic` and `minimax_generator`."""
    return Scalar(minimax_critic, minimax_generator)


def nonsaturating() -> Scalar:
    """See `minimax_critic` and `nonsaturating_generator`."""
    return Scalar(minimax_critic, nonsaturating_generator)


def boundary_seeking() -> Scalar:
    """See `minimax_critic` and `boundary_seeking_generator`."""
    return Scalar(minimax_critic, boundary_seeking_generator)


def least_squares() -> Scalar:
    """See `least_squares_critic` and `least_squares_generator`."""
    return Scalar(least_squares_critic, least_squares_generator)


def hinge() -> Scalar:
    """See `hinge_critic` and `wasserstein_generator`."""
    return Scalar(hinge_critic, wasserstein_generator)


def wasserstein() -> Scalar:
    """See `wasserstein_critic` and `wasserstein_generator`."""
    return Scalar(wasserstein_critic, wasserstein_generator)
