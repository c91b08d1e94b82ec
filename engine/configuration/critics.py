"""From a configuration to an adversarial method: the critic, the game, and the penalties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.comparison.games.penalties import PENALTIES, Penalty
from engine.configuration.adversarial import critic_outputs, penalty_names
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.configuration.games import critic_steps, make_game, make_kernel
from engine.configuration.inputs import amp_dtype
from engine.configuration.moment_methods import make_denoisers, make_denoising, make_learned_moments
from engine.generation.networks import Generator
from engine.generation.priors import make_prior
from engine.methods.adversarial import Adversarial
from engine.representation.critics import Critic, build_critic
from engine.support.errors import InputError
from engine.training.ranks import ALONE, Ranks
from pipelines import ImageDataset


def make_penalties(config: Config) -> list[Penalty]:
    """The penalties that are asked for, in the order in which they are applied."""
    critic = config.critic
    weights = dict(zip(critic.penalty, critic.penalty_weight, strict=False))
    found = []
    for name in penalty_names(config):
        options: dict[str, Any] = {}
        if name in weights:
            options["limit" if name == "clip" else "weight"] = weights[name]
        if name in ("scaled", "witness"):
            options["kernel"] = make_kernel(config)
        if name == "scaled":  # as published: beside λ k(x, x) = 10 the critic's derivative would count a tenth
            options["values"] = False
        found.append(PENALTIES[name](**options))
    return found


def make_critics(config: Config) -> dict[str, nn.Module]:
    """The configured "critic" and, where its features are denoised, the "denoiser", on the CPU; initialised from
    torch's random state."""
    settings = config.critic
    with arguments_as(outputs="critic_outputs", norm="critic_norm", name="critic", image_size="critic"):
        critic = build_critic(
            settings.critic,
            image_size=config.data.image_size,
            outputs=critic_outputs(config),
            norm=settings.critic_norm,
            minibatch_discrimination=settings.minibatch_discrimination,
            weights=settings.critic_weights,
        )
    return {"critic": critic, **make_denoisers(config, critic)}


def real_labels(config: Config, dataset: ImageDataset) -> Tensor | None:
    """Class numbers of all real images, int64, where the method reads them; InputError if they have none."""
    if config.method.method != "improved-gan" or config.game.classes is None:
        return None
    if dataset.labels is None:
        raise InputError("classes", f"{dataset.name} has no labels; leave it out")
    if dataset.num_classes > config.game.classes:
        raise InputError("classes", f"{dataset.name} has {dataset.num_classes}, and {config.game.classes} were given")
    return torch.from_numpy(dataset.labels)


def make_adversarial(
    config: Config,
    generator: Generator,
    networks: Mapping[str, nn.Module],
    ranks: Ranks = ALONE,
    labels: Tensor | None = None,
) -> Adversarial:
    """The configured adversarial method.

    Args:
        generator, networks: on their device; see `make_critics`.
        ranks: the processes that share every minibatch.
        labels: from `real_labels`.
    """
    settings, training, updates, critic = config.critic, config.training, config.updates, networks["critic"]
    assert isinstance(critic, Critic)
    beta1 = training.beta1 if settings.critic_beta1 is None else settings.critic_beta1
    beta2 = training.beta2 if settings.critic_beta2 is None else settings.critic_beta2
    prior = make_prior(config.networks.prior, config.networks.nz)
    options: dict[str, Any] = {
        "batch_size": training.batch_size,
        "lr": training.lr,
        "betas": (training.beta1, training.beta2),
        "optimizer": updates.optimizer,
        "weight_decay": updates.weight_decay,
        "clip_grad": updates.clip_grad,
        "critic_lr": settings.critic_lr,
        "critic_betas": (beta1, beta2),
        "critic_optimizer": settings.critic_optimizer,
        "amp_dtype": amp_dtype(config),
        "recompute_generator": training.recompute_generator,
        "batch_statistics": config.networks.sample_bn == "batch",
        "ranks": ranks,
        "global_batches": config.networks.generator_bn == "global",
    }
    if config.method.method == "molm":
        return make_learned_moments(config, generator, critic, prior, options)
    options["critic_steps"] = critic_steps(config)
    if config.method.method == "dfm":
        return make_denoising(config, generator, critic, networks["denoiser"], prior, make_penalties(config), options)
    game = make_game(config)
    with arguments_as(labels="classes"):
        return Adversarial(generator, critic, prior, game, make_penalties(config), labels=labels, **options)
