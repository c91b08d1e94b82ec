"""Settings that decide nothing beside others: nobody may give them, and a run's command has none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from engine.configuration.autoencoding import idle_codes
from engine.configuration.latent import idle_latent
from engine.configuration.methods import ADVERSARIAL, COMPARING, WITH_TABLE
from engine.configuration.options import require

if TYPE_CHECKING:
    from engine.configuration.config import Config

_BETAS = ("beta1", "beta2")
_OF_EVALUATIONS = ("evaluate_samples", "evaluate_extractor", "evaluate_weights")
_OF_AVERAGERS = {"ama_lr": "ama", "ama_variant": "ama", "ma_alpha": "ma", "ma_variant": "ma"}


def idle(config: Config) -> dict[str, str]:
    """Fields that decide nothing in `config`, each with the reason; those of other methods are not among them."""
    found = {}
    population, averager = config.population.population, config.gfmn.averager
    if config.method.method == "gfmn" and population != "none":
        found = dict.fromkeys(
            ("averager", *_OF_AVERAGERS), f"--population {population} takes the averager's place; leave one of them out"
        )
    elif config.method.method == "gfmn":
        found = {
            name: f"needs --averager {of}, and this is --averager {averager}"
            for name, of in _OF_AVERAGERS.items()
            if of != averager
        }
    if not config.training.amp:
        found["amp_dtype"] = "needs --amp"
    if config.validation.evaluate_every is None:
        found |= dict.fromkeys(_OF_EVALUATIONS, "needs --evaluate-every N")
    found |= _idle_networks(config) | _idle_betas(config) | _idle_games(config)
    return {**found, **idle_codes(config), **idle_latent(config)}


def _idle_networks(config: Config) -> dict[str, str]:
    networks, found = config.networks, {}
    if config.method.method in COMPARING and "+" not in networks.extractor:
        alone = f"and --extractor {networks.extractor} is one"
        if config.features.normalise_losses:
            found["normalise_losses"] = f"needs several networks, {alone}"
        if networks.layers is None:
            found["layers_from"] = f"needs --layers K, or several networks, {alone}"
    if networks.generator != "dcgan":
        found["upsampling"] = f"--generator {networks.generator} has its own, nearest"
    return found


def _idle_betas(config: Config) -> dict[str, str]:
    """Numbers of Adam where nothing is trained by it. The critic has the generator's unless it has its own; codes of
    images, and the map to them, always have an Adam."""
    adversarial, optimizer = config.method.method in ADVERSARIAL, config.updates.optimizer
    own = config.critic.critic_optimizer if adversarial else None
    found = {}
    if adversarial and (own or optimizer) == "rmsprop":
        flag = "optimizer" if own is None else "critic-optimizer"
        found = {f"critic_{name}": f"--{flag} rmsprop has none" for name in _BETAS}
    if optimizer == "rmsprop" and config.method.method not in WITH_TABLE:
        instead = {name for name in _BETAS if getattr(config.critic, f"critic_{name}") is not None}
        unread = _BETAS if own in (None, "rmsprop") else instead
        found |= dict.fromkeys(unread, "--optimizer rmsprop has none")
    return found


def _idle_games(config: Config) -> dict[str, str]:
    method, match = config.method.method, config.game.match
    found = {}
    if method in ADVERSARIAL and not config.critic.varies:
        found["critic_many"] = "needs --critic-warmup or --critic-every"
    if method == "mcgan":
        name, of = ("match_norm", "mean") if match == "covariance" else ("match_directions", "covariance")
        found[name] = f"needs --match {of}, and this is --match {match}"
    if method == "dfm" and config.denoising.denoise_weight == 0:
        names = ("denoise_deviation", "denoiser_width", "denoiser_layers", "denoiser_lr")
        found |= dict.fromkeys(names, "needs a --denoise-weight above 0")
    return found


def check_used(given: Iterable[str], config: Config) -> None:
    """InputError if one of the fields that somebody has `given` decides nothing in `config`."""
    reasons = idle(config)
    for name in given:
        require(name not in reasons, name, reasons.get(name, ""))
