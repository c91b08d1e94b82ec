"""Pure functions of two sets of features, [n, F] and [m, F]; nothing here knows a network.

`mmd`, `frechet` and the others take both sets. `MMD`, `LandmarkMMD`, `Frechet` and `Sinkhorn` have the real side bound,
with what depends on it alone computed once.
"""

from engine.comparison.distances import kernels
from engine.comparison.distances.drift import drifting
from engine.comparison.distances.gaussians import Frechet, frechet, frechet_of_moments
from engine.comparison.distances.landmarks import LandmarkMMD, choose_landmarks
from engine.comparison.distances.mean_embedding import MMD, energy_distance, mmd
from engine.comparison.distances.transport import Sinkhorn, sinkhorn, sliced_wasserstein

__all__ = [
    "MMD",
    "Frechet",
    "LandmarkMMD",
    "Sinkhorn",
    "choose_landmarks",
    "drifting",
    "energy_distance",
    "frechet",
    "frechet_of_moments",
    "kernels",
    "mmd",
    "sinkhorn",
    "sliced_wasserstein",
]
