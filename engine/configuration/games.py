"""From a configuration to the game of an adversarial method, and to how many steps the critic takes in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.comparison.distances import kernels
from engine.comparison.games import GAMES, Game
from engine.configuration.adversarial import KERNELS
from engine.methods.adversarial import CriticSteps, is_capturable

if TYPE_CHECKING:
    from engine.configuration.config import Config


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


def _nonsaturating(config: Config) -> Game:
    return GAMES["nonsaturating"]()


_GAMES: dict[str, Callable[[Config], Game]] = {
    "gan": _gan,
    "mmd-gan": _mmd,
    "began": _began,
    "fisher-gan": _fisher,
    "mcgan": _mcgan,
    "improved-gan": _improved,
    "dfm": _nonsaturating,
    "molm": _nonsaturating,
}


def make_game(config: Config) -> Game:
    """What critic and generator want of each other."""
    return _GAMES[config.method.method](config)


def critic_steps(config: Config) -> CriticSteps:
    """How many steps the critic takes before one of the generator."""
    settings = config.critic
    return CriticSteps(
        usual=settings.critic_steps,
        more=settings.critic_many,
        warmup=settings.critic_warmup,
        every=settings.critic_every,
    )


def has_capturable_game(config: Config) -> bool:
    """Whether nothing in the game of an adversarial method keeps its step from being captured."""
    return is_capturable(make_game(config), critic_steps(config))
