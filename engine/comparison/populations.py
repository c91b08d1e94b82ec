"""Populations: moments over past minibatches as well as the newest, through which alone the gradient flows.

A minibatch of 64 images has noisy moments. An averager (`engine.comparison.averagers`) smooths the difference to the
target; a population instead smooths the generated side: with the newest minibatch's share c of the population,

    μ̂ = (1−c) μ_e + c m        σ̂ = (1−c) s_e + c s + c (1−c) (m − μ_e)²        L = Σ (μ̂ − μ*)² + (σ̂ − σ*)²

where m and s are the newest minibatch's mean and variance (N in the denominator) and μ_e, s_e those of the others; the
target's σ* has its own correction (`MomentMatching`). This is σ̂ = q̂ − μ̂² of the running mean of x², without its
cancellation. The gradient of every feature stays affine in it (docs/method.md, identity 1):

    b = 4c/N · (σ̂ − σ*)        a = 2c/N · (μ̂ − μ*) − b μ̂

For moments of every feature a population is an `Averager`, in the place of the others: the same step, the same state
in checkpoints. For distances of pooled features it is a module around the distance.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import final

import torch
from torch import Tensor, nn

from engine.comparison.averagers import Averager, BatchMoments, Direction, TargetMoments
from engine.support.errors import InputError
from kernels import reference


class Population(Averager):
    """Base of the populations: `others` and `push` are all that they differ in."""

    @abstractmethod
    def others(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the minibatches before the newest, [2, D], and the newest one's share c, [] float64.

        Both are on the device. While there are none before it, c is 1.
        """

    @abstractmethod
    def push(self, moments: Tensor, population: Tensor) -> None:
        """Let the newest minibatch join: its `moments`, and those of the `population` with it, [2, D] each."""

    @final
    @torch.no_grad()
    def step(
        self,
        kernels: ModuleType,
        batch: BatchMoments,
        target: TargetMoments,
        *,
        correction: int,
        advance: bool = True,
        weight: Tensor | None = None,
    ) -> Direction:
        """See `Averager.step`; the population's variances have N in the denominator, and the target's its own."""
        moments = torch.stack((batch.mean, batch.m2 / batch.count))
        others, share = self.others()
        population = united(others, moments, share.to(moments.dtype))
        scale = None if weight is None else torch.stack((weight, weight.square()))
        difference = reference.difference(population, torch.stack((target.mean, target.variance)), scale)
        v = 2 * share.to(moments.dtype) * difference
        toward = v if scale is None else scale * v
        a, b = reference.coefficients(toward, population[0], batch.count, correction=0)
        if advance:
            self.push(moments, population)
            self.steps += 1
        loss = reference.matching_loss(v, difference, "squares")
        return Direction(a, b, reference.totals(loss, difference))


def united(others: Tensor, newest: Tensor, share: Tensor) -> Tensor:
    """Mean and variance [2, D] of a mixture of two sets of which the second has this `share`, [] (see the module)."""
    gap = newest[0] - others[0]
    mean = others[0] + share * gap
    variance = torch.lerp(others[1], newest[1], share) + share * (1 - share) * gap.square()
    return torch.stack((mean, variance))


@final
class MovingPopulation(Population):
    """A moving average of the generated features' moments: every minibatch's weight falls by β from step to step.

    The newest minibatch's share is c = (1−β)/(1−β^t), as in Adam's bias correction, so that the first t minibatches are
    the exact weighted mixture of themselves and not of a start that nobody drew. For t → ∞ it is 1 − β.

    Args:
        decay: β in [0, 1); 1/(1−β) minibatches are remembered, about.

    Raises InputError for a β out of range.
    """

    population: Tensor

    def __init__(self, decay: float = 0.9):
        if not 0 <= decay < 1:
            raise InputError("decay", f"must be in [0, 1), got {decay}")
        super().__init__()
        self.decay = decay

    @property
    def state_names(self) -> tuple[str, ...]:
        """The population's mean and variance."""
        return ("population",)

    def others(self) -> tuple[Tensor, Tensor]:
        """See `Population.others`."""
        steps = self.steps.double() + 1
        return self.population, (1 - self.decay) / (1 - self.decay**steps)

    def push(self, moments: Tensor, population: Tensor) -> None:
        """See `Population.push`."""
        self.population.copy_(population)


@final
class QueuedPopulation(Population):
    """The moments of the last K minibatches, all with the same weight: c = 1/min(t, K).

    K·2·D numbers are kept, and read at every step: moments merge exactly, so the images' features need not be.

    Args:
        minibatches: K, with the newest.

    Raises InputError for K < 1.
    """

    queue: Tensor

    def __init__(self, minibatches: int = 10):
        if minibatches < 1:
            raise InputError("minibatches", f"must be at least 1, got {minibatches}")
        super().__init__()
        self.minibatches = minibatches

    @property
    def state_names(self) -> tuple[str, ...]:
        """Rows 2i and 2i + 1 are mean and variance of one of the minibatches; they take turns."""
        return ("queue",)

    def rows(self, name: str) -> int:
        """See `Averager.rows`."""
        return 2 * self.minibatches

    def others(self) -> tuple[Tensor, Tensor]:
        """See `Population.others`. The minibatch that the newest will replace counts no more."""
        kept = torch.minimum(self.steps, self.steps.new_full((), self.minibatches - 1)).double()
        places = torch.arange(self.minibatches, device=self.steps.device)
        age = (self.steps - 1 - places) % self.minibatches  # of the minibatch in each place, the newest one's 0
        weights = (age < kept).to(self.queue.dtype) / kept.clamp(min=1).to(self.queue.dtype)
        means, variances = self.queue.view(self.minibatches, 2, -1).unbind(1)
        mean = weights @ means
        spread = weights @ (means - mean).square()
        return torch.stack((mean, weights @ variances + spread)), 1 / (kept + 1)

    def push(self, moments: Tensor, population: Tensor) -> None:
        """See `Population.push`."""
        place = (self.steps % self.minibatches).view(1)
        self.queue.view(self.minibatches, 2, -1).index_copy_(0, place, moments[None])


class QueuedFeatures(nn.Module):
    """A distance of the last generated images' pooled features, with the gradient through the newest minibatch alone.

        L = distance([x; q]),    q = the features of the Q images before these, as they were drawn, [Q, F]

    Before the first minibatch q is copies of that one, whose mean and covariance are its own where Q is a multiple of
    N: the number of rows never changes. Only calls in train mode with a gradient join the queue.

    Args:
        distance: features [n, F] → [].
        others: Q, images besides the newest minibatch; 0 for none.
        features: F.
    """

    queue: Tensor
    started: Tensor

    def __init__(self, distance: Callable[[Tensor], Tensor], others: int, features: int, like: Tensor):
        super().__init__()
        self.distance, self.others = distance, others
        self.register_buffer("queue", like.new_zeros(others, features))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool, device=like.device))

    def forward(self, features: Tensor) -> Tensor:
        """L of x [N, F]."""
        newest = features.detach()
        copies = newest.repeat(-(-self.others // len(newest)), 1)[: self.others]
        queue = torch.where(self.started, self.queue, copies.to(self.queue.dtype))
        loss = self.distance(torch.cat((features, queue)))
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.queue.copy_(torch.cat((newest.to(queue.dtype), queue))[: self.others])
                self.started.fill_(True)
        return loss


class MovingCovariance(nn.Module):
    """A distance of the moving average of generated features' mean and full covariance (see `MovingPopulation`).

        μ̂ = (1−c) μ_e + c m        Σ̂ = (1−c) Σ_e + c S + c (1−c) (m − μ_e)(m − μ_e)ᵀ        c = (1−β)/(1−β^t)

    with m and S (N in the denominator) the newest minibatch's, through which alone the gradient flows. Only calls in
    train mode with a gradient join the average.

    Args:
        distance: (mean [F], covariance [F, F]) → [], such as `Frechet.of_moments`.
        decay: β in [0, 1).
        features: F; a covariance has F² numbers, in float64.

    Raises InputError for a β out of range.
    """

    mean: Tensor
    covariance: Tensor
    steps: Tensor

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor], decay: float, features: int, like: Tensor):
        super().__init__()
        if not 0 <= decay < 1:
            raise InputError("decay", f"must be in [0, 1), got {decay}")
        self.distance, self.decay = distance, decay
        zeros = torch.zeros(features, features, dtype=torch.float64, device=like.device)
        self.register_buffer("mean", zeros[0].clone())
        self.register_buffer("covariance", zeros)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=like.device))

    def forward(self, features: Tensor) -> Tensor:
        """L of x [N, F]."""
        x = features.double()
        share = (1 - self.decay) / (1 - self.decay ** (self.steps.double() + 1))
        newest = x.mean(dim=0)
        centred, gap = x - newest, newest - self.mean
        mean = self.mean + share * gap
        covariance = torch.lerp(self.covariance, centred.T @ centred / len(x), share)
        covariance = covariance + share * (1 - share) * torch.outer(gap, gap)
        loss = self.distance(mean, covariance)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.mean.copy_(mean)
                self.covariance.copy_(covariance)
                self.steps += 1
        return loss.to(features.dtype)
