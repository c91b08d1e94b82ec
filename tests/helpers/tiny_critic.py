"""Helpers: the smallest method that reads real images and has neither extractor nor target, under the name `NAME`.

A scalar critic φ on the images' pixels and the non-saturating game: it learns to minimise
softplus(−φ(real)) + softplus(φ(fake)), several times in a step, and the generator softplus(−φ(fake)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.configuration import build, methods
from engine.configuration.config import Config
from engine.generation.batch_norm import share_batches
from engine.generation.networks import Generator
from engine.generation.priors import Noise, make_prior
from engine.generation.sampling import Sampler
from engine.methods.gradient_step import GradientStep
from engine.methods.protocols import SKIPPED
from engine.training.ranks import ALONE, Ranks
from pipelines import Batch

NAME = "tiny-critic"
CRITIC_STEPS = 2
_POOLED = 4


class TinyCritic:
    """See above (`engine.methods.protocols.Method`)."""

    reads: Literal["nothing", "images"] = "images"
    capturable = True

    def __init__(self, config: Config, generator: Generator, networks: build.Networks, ranks: Ranks = ALONE):
        training = config.training
        self.generator, self.prior = generator, make_prior(config.networks.prior, config.networks.nz)
        self.ranks, self.batch_size, self.critic_steps = ranks, training.batch_size, CRITIC_STEPS
        self.critic = networks["critic"]
        if ranks.size > 1:
            share_batches(generator, ranks)
        self.modules = nn.ModuleDict({"generator": generator, **networks})
        self.steps = {name: GradientStep(module, lr=training.lr, ranks=ranks) for name, module in self.modules.items()}
        self.optimizers: dict[str, torch.optim.Optimizer] = {name: step.optimizer for name, step in self.steps.items()}

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`."""
        assert batches is not None
        for _ in range(self.critic_steps):
            real = next(batches).images
            fake = self._draw(noise).detach()
            critic_loss = F.softplus(-self.critic(real)).sum() + F.softplus(self.critic(fake)).sum()
            self.steps["critic"].take(critic_loss / self.batch_size)
        loss = F.softplus(-self.critic(self._draw(noise))).sum() / self.batch_size
        skipped = self.steps["generator"].take(loss)
        losses = [loss.detach().clone(), critic_loss.detach() / self.batch_size]
        self.ranks.sum_(losses)
        return {"loss": losses[0], "loss_critic": losses[1], SKIPPED: skipped}

    def _draw(self, noise: Noise) -> Tensor:
        z = noise.draw(self.prior, self.batch_size)
        return self.generator(z[self.ranks.share(self.batch_size)])

    def sampler(self) -> Sampler:
        """See `Method.sampler`."""
        return Sampler(self.prior, self.generator)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert not state


def make_critic(config: Config) -> build.Networks:
    """φ: the pooled pixels, and one linear layer."""
    pool = nn.AdaptiveAvgPool2d(_POOLED)
    return {"critic": nn.Sequential(pool, nn.Flatten(), nn.Linear(3 * _POOLED**2, 1))}


def register(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone, commands know the method by its name."""
    patch.setitem(methods.METHODS, NAME, "a scalar critic of pixels")
    patch.setitem(methods.NEEDS, NAME, methods.Needs(features=False))
    patch.setitem(build.RECIPES, NAME, build.Recipe(make_critic, TinyCritic))
    (entry,) = dataclasses.fields(methods.MethodConfig)
    patch.setattr(entry, "metadata", {**entry.metadata, "choices": tuple(methods.METHODS)})
