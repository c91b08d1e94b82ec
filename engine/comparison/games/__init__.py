"""Games between a critic and a generator: pure functions of the critic's outputs; nothing here knows a network."""

from collections.abc import Callable

from engine.comparison.games.adversarial import (
    boundary_seeking,
    hinge,
    least_squares,
    minimax,
    nonsaturating,
    wasserstein,
)
from engine.comparison.games.began import Began
from engine.comparison.games.fisher import Fisher
from engine.comparison.games.matching import FeatureMatching
from engine.comparison.games.mcgan import CovarianceMatching, MeanMatching
from engine.comparison.games.mmd import MMDGame, RootMMDGame
from engine.comparison.games.protocols import Game

# What a game is called → what makes it.
GAMES: dict[str, Callable[..., Game]] = {
    "minimax": minimax,
    "nonsaturating": nonsaturating,
    "least-squares": least_squares,
    "boundary-seeking": boundary_seeking,
    "hinge": hinge,
    "wasserstein": wasserstein,
    "began": Began,
    "fisher": Fisher,
    "mcgan-mean": MeanMatching,
    "mcgan-covariance": CovarianceMatching,
    "feature-matching": FeatureMatching,
    "mmd": MMDGame,
    "root-mmd": RootMMDGame,
}

__all__ = [
    "GAMES",
    "Began",
    "CovarianceMatching",
    "FeatureMatching",
    "Fisher",
    "Game",
    "MMDGame",
    "MeanMatching",
    "RootMMDGame",
]
