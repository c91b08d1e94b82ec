"""Penalties that look at no image: none at all, and clipped weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.comparison.games.outputs import check_positive
from engine.comparison.games.penalties.protocols import PENALTY, Play


@dataclass(frozen=True)
class NoPenalty:
    """The game's loss as it is."""

    double_backward = False
    at_real = False
    has_terms = False
    figure = PENALTY

    def terms(self, play: Play) -> Tensor:
        """Zeros [n]."""
        return torch.zeros(len(play.real), device=play.real.device)

    def applied(self, loss: Tensor, terms: Tensor) -> Tensor:
        """The loss."""
        return loss

    def project_(self, critic: nn.Module) -> None:
        """Nothing to move."""


@dataclass(frozen=True)
class Clip(NoPenalty):
    """Every parameter of the critic is clipped to [−limit, limit] after each step (WGAN, Arjovsky et al. 2017).

    Only the outputs have to be smooth: what they don't depend on, such as the decoder of Li et al. 2017 (MMD-GAN), is
    left alone. A critic says it by `beside`, a list of such modules.

    Raises:
        InputError: "limit", if it isn't positive and finite.
    """

    limit: float = 0.01

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)

    @torch.no_grad()
    def project_(self, critic: nn.Module) -> None:
        """See `Penalty.project_`. A parameter that is NaN stays so."""
        spared = {id(parameter) for module in getattr(critic, "beside", ()) for parameter in module.parameters()}
        clipped: list[Tensor] = [parameter for parameter in critic.parameters() if id(parameter) not in spared]
        torch._foreach_clamp_min_(clipped, -self.limit)
        torch._foreach_clamp_max_(clipped, self.limit)
