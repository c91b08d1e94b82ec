"""Games between a critic and a generator: pure functions of the critic's outputs; nothing here knows a network."""

from collections.abc import Callable

from engine.comparison.games.mmd import MMDGame, RootMMDGame
from engine.comparison.games.protocols import Game

# What a game is called → what makes it.
GAMES: dict[str, Callable[..., Game]] = {
    "mmd": MMDGame,
    "root-mmd": RootMMDGame,
}

__all__ = ["GAMES", "Game"]
