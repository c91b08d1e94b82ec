"""MMD-GAN: the critic's outputs are features, and critic and generator play for their maximum mean discrepancy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.comparison.distances import mmd
from engine.comparison.distances.kernels import Kernel, check_features, gaussian, rational_quadratic
from engine.comparison.games.outputs import check_positive, checked
from engine.comparison.games.protocols import Stateless
from engine.support.errors import InputError


def discrepancy(real: Tensor, fake: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    """MMD² of outputs [n, F] and [m, F], as []; see `distances.mmd`.

    Raises:
        InputError: "real" or "fake", if it has another shape, or fewer than 2 rows if unbiased.
    """
    check_features("real", real, at_least=2 if unbiased else 1)
    check_features("fake", fake, at_least=2 if unbiased else 1, size=real.shape[1])
    return mmd(real, fake, kernel, unbiased)


def mmd_critic(real: Tensor, fake: Tensor, kernel: Kernel) -> Tensor:
    """−MMD², unbiased: what the critic minimises (Bińkowski et al. 2018)."""
    return -discrepancy(real, fake, kernel, unbiased=True)


def mmd_generator(real: Tensor, fake: Tensor, kernel: Kernel) -> Tensor:
    """MMD², unbiased: what the generator minimises."""
    return discrepancy(real, fake, kernel, unbiased=True)


def root_mmd(real: Tensor, fake: Tensor, kernel: Kernel, floor: float) -> Tensor:
    """√(max(MMD², 0) + floor), biased; the floor keeps the root's derivative finite where the two sets are alike."""
    return (discrepancy(real, fake, kernel, unbiased=False).clamp_min(0) + floor).sqrt()


def one_sided(real: Tensor, fake: Tensor) -> Tensor:
    """The mean over outputs f of min(0, E φ_f(x) − E φ_f(G)): zero if no output is larger on generated images."""
    real, fake = checked(real, fake)
    return (real.mean(dim=0) - fake.mean(dim=0)).clamp_max(0).mean()


def root_mmd_critic(real: Tensor, fake: Tensor, kernel: Kernel, weight: float, floor: float) -> Tensor:
    """−(√MMD² + weight · one-sided term): what the critic minimises (Li et al. 2017)."""
    return -root_mmd_generator(real, fake, kernel, weight, floor)


def root_mmd_generator(real: Tensor, fake: Tensor, kernel: Kernel, weight: float, floor: float) -> Tensor:
    """√MMD² + weight · one-sided term: what the generator minimises; its feasible set is the critic's."""
    return root_mmd(real, fake, kernel, floor) + weight * one_sided(real, fake)


@dataclass(frozen=True)
class MMDGame(Stateless):
    """Unbiased MMD² of the critic's outputs (Bińkowski et al. 2018); see `mmd_critic`.

    Args:
        kernel: of outputs, one of `distances.kernels`; the paper's rq, rq*, rbf, linear and distance are
            `rational_quadratic`, `rational_quadratic_linear`, `gaussian`, `linear` and `energy`.
    """

    kernel: Kernel = field(default_factory=rational_quadratic)
    outputs = None
    reads_real = True

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return mmd_critic(real, fake, self.kernel)

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return mmd_generator(real, fake, self.kernel)

    def figures(self, real: Tensor, fake: Tensor, loss: Tensor) -> Mapping[str, Tensor]:
        """As "distance", MMD², unbiased."""
        return {"distance": -loss}


@dataclass(frozen=True)
class RootMMDGame(Stateless):
    """√MMD² of the critic's outputs, biased, with a one-sided term (Li et al. 2017); see `root_mmd_critic`.

    The authors' terms for an autoencoder are a penalty, `autoencode`.

    Args:
        kernel: of outputs; the paper's is `gaussian()` with the deviations 1, 2, 4, 8 and 16.
        one_sided_weight: of the one-sided term; 0 leaves it out.
        floor: added to MMD² under the root.

    Raises:
        InputError: "one_sided_weight" or "floor", if they are out of range.
    """

    kernel: Kernel = field(default_factory=gaussian)
    one_sided_weight: float = 16.0
    floor: float = 1e-6
    outputs = None
    reads_real = True

    def __post_init__(self) -> None:
        if not 0 <= self.one_sided_weight < float("inf"):
            raise InputError("one_sided_weight", f"must be at least 0 and finite, got {self.one_sided_weight}")
        check_positive("floor", self.floor)

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return root_mmd_critic(real, fake, self.kernel, self.one_sided_weight, self.floor)

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return root_mmd_generator(real, fake, self.kernel, self.one_sided_weight, self.floor)

    @torch.no_grad()
    def figures(self, real: Tensor, fake: Tensor, loss: Tensor) -> Mapping[str, Tensor]:
        """As "distance", √MMD², biased."""
        return {"distance": -loss - self.one_sided_weight * one_sided(real, fake)}
