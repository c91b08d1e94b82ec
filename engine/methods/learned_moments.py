"""The method of learned moments: matching averages of a network that is trained, now and then, to tell images apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.comparison.games.adversarial import minimax_critic, nonsaturating
from engine.comparison.games.learned_moments import moment_distance, norm_penalty
from engine.generation.networks import Generator
from engine.generation.priors import Noise, Prior
from engine.methods.adversarial import Adversarial
from engine.methods.protocols import SKIPPED
from engine.representation.critics import Critic
from engine.representation.critics.hidden_units import MomentNetwork
from engine.support.errors import InputError
from pipelines import Batch

_MOMENTS, _LEARNT = "moments", ("critic_loss", "penalty")


@dataclass(frozen=True, kw_only=True)
class MomentSchedule:
    """When the moments change.

    Attributes:
        every: steps of the generator with one network's moments (the paper's n_g).
        steps: of the network before these (n_m).
        images: real ones, at least, whose mean moments are matched then: so many minibatches.
    """

    every: int
    steps: int
    images: int


class LearnedMoments(Adversarial):
    """A step of the generator; before every so many, steps of the moment network D (`engine.methods.protocols`).

        network:     E softplus(−D(x)) + E softplus(D(G)) + λ(‖E ∇_w D(x)‖² − 1)²
        generator:   ½ ‖E Φ(x) − E Φ(G)‖²,  Φ = (∇_w D, s·x, s·h_1, s·h_2, …)

    E Φ(G) is of the minibatch, and E Φ(x) of many real minibatches, found once after the network has changed. Every
    rank has its share of the images. Their moments are added, K numbers, and with E Φ(x) − E Φ(G) known each rank goes
    back from it to its own images alone: the gradients add up.

    The first step of every so many reads more images than the others, so none can be captured.

    Source: Ravuri et al. 2018 (arXiv 1806.11006), algorithm 1. The paper's E Φ(x) is of the whole data set, that of
    `images` as many as it has here.

    Args:
        generator: on one device with the critic, in training mode.
        critic: D; see `MomentNetwork`. Whatever the precision, it computes in its own.
        prior: the law of z.
        schedule: when the network learns.
        penalty: λ.
        scale: s, of images and hidden units.
        options: as of `Adversarial`.

    Raises:
        InputError: "critic", see `MomentNetwork`; "every", "steps" or "images", if below 1.
    """

    differentiates_twice = True

    def __init__(
        self,
        generator: Generator,
        critic: Critic,
        prior: Prior,
        schedule: MomentSchedule,
        *,
        penalty: float,
        scale: float,
        **options: Any,
    ):
        for name, value in vars(schedule).items():
            if value < 1:
                raise InputError(name, f"must be at least 1, got {value}")
        self.network = MomentNetwork(critic, scale)
        super().__init__(generator, critic, prior, nonsaturating(), **options)
        self.schedule, self.penalty, self.capturable = schedule, penalty, False
        self.real = torch.zeros(0, dtype=self.dtype, device=self.device)
        self.learnt = {name: torch.zeros((), dtype=self.dtype, device=self.device) for name in _LEARNT}

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`. The network's scalars are means over the last steps that it took."""
        assert batches is not None
        skipped = {}
        self._copy_weights()
        if self.steps % self.schedule.every == 0:
            found = [self._critic_step(next(batches), noise) for _ in range(self.schedule.steps)]
            self.learnt = {name: torch.stack([one[name] for one in found]).mean() for name in _LEARNT}
            skipped = {f"critic_{SKIPPED}": torch.stack([one[SKIPPED] for one in found]).amax()}
            self.real = self._moments(batches)
        loss, of_generator = self._generator_step(batches, noise)
        self.steps += 1
        return {"loss": loss, **self.learnt, **skipped, SKIPPED: of_generator}

    def _critic_step(self, batch: Batch, noise: Noise, *, last: bool = False) -> Mapping[str, Tensor]:
        with torch.no_grad():
            fake = self._draw(noise)
        of_real, of_fake = self.critic(torch.cat([batch.images.to(self.dtype), fake])).split(len(fake))
        # Sums over ranks: of the losses, which are means, and of the gradient before its norm is taken.
        game = minimax_critic(of_real, of_fake) * len(fake) / self.batch_size
        own = self.network.gradient(of_real, self.batch_size, create_graph=True)
        total, whole = own.detach().clone(), game.detach().clone()
        self.ranks.sum_([total, whole])
        total.requires_grad_()
        penalty = norm_penalty(total, self.penalty)
        (direction,) = torch.autograd.grad(penalty, total)
        skipped = self.critic_step.take(game + own @ direction)
        penalty = penalty.detach()
        return {"critic_loss": whole + penalty, "penalty": penalty, SKIPPED: skipped}

    def _moments(self, batches: Iterator[Batch]) -> Tensor:
        """E Φ(x) over the next minibatches, [K]."""
        number = -(-self.schedule.images // self.batch_size)
        total = sum(
            self.network.means(next(batches).images.to(self.dtype), number * self.batch_size) for _ in range(number)
        )
        assert isinstance(total, Tensor)
        self.ranks.sum_([total])
        return total

    def _generator_step(self, batches: Iterator[Batch], noise: Noise) -> tuple[Tensor, Tensor]:
        images = self._draw(noise)
        leaf = images.detach().requires_grad_()
        own = self.network.means(leaf, self.batch_size, create_graph=True)
        total = own.detach().clone()
        self.ranks.sum_([total])
        loss = moment_distance(self.real, total)
        # ∂loss/∂images first: the network's weights need no gradient.
        (of_images,) = torch.autograd.grad(own, leaf, total - self.real)
        return loss, self._take_generator((images * of_images).sum())

    def state_dict(self) -> dict[str, Tensor]:
        """As of `Adversarial`; the real images' moments, and what the log has of the network."""
        return {**super().state_dict(), _MOMENTS: self.real, **self.learnt}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; KeyError or ValueError if the state is another method's."""
        self.real = state[_MOMENTS].to(self.real)
        self.learnt = {name: state[name].to(self.real) for name in _LEARNT}
        super().load_state_dict(state)
