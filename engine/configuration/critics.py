"""From a configuration to an adversarial method: the critic, the game, and the penalties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.comparison.distances import kernels
from engine.comparison.games import GAMES, Game
from engine.comparison.games.penalties import PENALTIES, Penalty
from engine.configuration.adversarial import KERNELS, critic_outputs, penalty_names
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.configuration.inputs import amp_dtype
from engine.generation.networks import Generator
from engine.generation.priors import make_prior
from engine.methods.adversarial import Adversarial, CriticSteps
from engine.representation.critics import Critic, build_critic
from engine.support.errors import InputError
from engine.training.ranks import ALONE, Ranks
from pipelines import ImageDataset


def make_kernel(config: Config) -> kernels.Kernel:
    """The kernel of the critic's outputs."""
    factory, bandwidths = kernels.KERNELS[KERNELS[config.game.kernel]], config.game.bandwidths
    return factory(bandwidths) if bandwidths else factory()


def _gan(config: Config) -> Game:
    return GAMES[config.game.game]()


def _mmd(config: Config) -> Game:
    return GAMES["mmd" if config.game.estimate == "unbiased" else "root-mmd"](make_kernel(config))


def _began(config: Config) -> Game:
    return GAMES["began"](config.game.began_gamma, config.game.began_rate)


def _fisher(config: Config) -> Game:
    return GAMES["fisher"](config.game.fisher_rho)


def _mcgan(config: Config) -> Game:
    if config.game.match == "covariance":
        return GAMES["mcgan-covariance"](config.game.match_directions)
    return GAMES["mcgan-mean"](float(config.game.match_norm))


def _improved(config: Config) -> Game:
    return GAMES["feature-matching"](config.game.classes)


_GAMES: dict[str, Callable[[Config], Game]] = {
    "gan": _gan,
    "mmd-gan": _mmd,
    "began": _began,
    "fisher-gan": _fisher,
    "mcgan": _mcgan,
    "improved-gan": _improved,
}


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
        found.append(PENALTIES[name](**options))
    return found


def make_critics(config: Config) -> dict[str, nn.Module]:
    """The configured "critic", initialised from torch's random state, on the CPU."""
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
    return {"critic": critic}


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
        labels: from `real_labels`; a model of a step has none, and needs none.
    """
    settings, training, updates, critic = config.critic, config.training, config.updates, networks["critic"]
    assert isinstance(critic, Critic)
    game = _GAMES[config.method.method](config)
    if game.reads_labels and labels is None:
        labels = torch.zeros(1, dtype=torch.int64)
    steps = CriticSteps(
        usual=settings.critic_steps,
        more=settings.critic_many,
        warmup=settings.critic_warmup,
        every=settings.critic_every,
    )
    beta1 = training.beta1 if settings.critic_beta1 is None else settings.critic_beta1
    beta2 = training.beta2 if settings.critic_beta2 is None else settings.critic_beta2
    with arguments_as(labels="classes"):
        return Adversarial(
            generator,
            critic,
            make_prior(config.networks.prior, config.networks.nz),
            game,
            make_penalties(config),
            batch_size=training.batch_size,
            critic_steps=steps,
            lr=training.lr,
            betas=(training.beta1, training.beta2),
            optimizer=updates.optimizer,
            weight_decay=updates.weight_decay,
            clip_grad=updates.clip_grad,
            critic_lr=settings.critic_lr,
            critic_betas=(beta1, beta2),
            critic_optimizer=settings.critic_optimizer,
            amp_dtype=amp_dtype(config),
            recompute_generator=training.recompute_generator,
            batch_statistics=config.networks.sample_bn == "batch",
            ranks=ranks,
            global_batches=config.networks.generator_bn == "global",
            labels=labels,
        )
