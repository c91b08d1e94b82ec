"""From a configuration to the methods that match what a critic sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from engine.comparison.games.penalties import Penalty
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.generation.networks import Generator
from engine.generation.priors import Prior
from engine.methods.denoising import DenoisingFeatureMatching
from engine.methods.learned_moments import LearnedMoments, MomentSchedule
from engine.representation.critics import Critic
from engine.representation.critics.critic import LinearCritic
from engine.representation.critics.denoiser import Denoiser


def make_denoisers(config: Config, critic: Critic) -> dict[str, nn.Module]:
    """The configured "denoiser" of the critic's features, initialised from torch's random state, on the CPU; nothing
    for other methods."""
    if config.method.method != "dfm":
        return {}
    settings, side = config.denoising, config.data.image_size
    with torch.no_grad():  # in evaluation, which changes nothing
        width = critic.eval().features(torch.zeros(1, 3, side, side)).shape[1]
    critic.train()
    return {"denoiser": Denoiser(width, settings.denoiser_width, settings.denoiser_layers)}


def make_denoising(
    config: Config,
    generator: Generator,
    critic: Critic,
    denoiser: nn.Module,
    prior: Prior,
    penalties: Sequence[Penalty],
    options: Mapping[str, Any],
) -> DenoisingFeatureMatching:
    """The configured `DenoisingFeatureMatching`, with these options of `Adversarial`."""
    assert isinstance(critic, LinearCritic)
    assert isinstance(denoiser, Denoiser)
    settings = config.denoising
    return DenoisingFeatureMatching(
        generator,
        critic,
        denoiser,
        prior,
        penalties,
        adversarial=settings.adversarial_weight,
        denoising=settings.denoise_weight,
        deviation=settings.denoise_deviation,
        denoiser_lr=settings.denoiser_lr,
        **options,
    )


def make_learned_moments(
    config: Config, generator: Generator, critic: Critic, prior: Prior, options: Mapping[str, Any]
) -> LearnedMoments:
    """The configured `LearnedMoments`, with these options of `Adversarial`."""
    settings = config.moments
    schedule = MomentSchedule(every=settings.moment_every, steps=settings.moment_steps, images=settings.moment_images)
    with arguments_as(every="moment_every", steps="moment_steps", images="moment_images"):
        return LearnedMoments(
            generator,
            critic,
            prior,
            schedule,
            penalty=settings.moment_penalty,
            scale=settings.moment_scale,
            **options,
        )
