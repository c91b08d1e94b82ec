"""Pure functions of two sets of features, [n, F] and [m, F]; nothing here knows a network."""

from engine.comparison.distances import kernels
from engine.comparison.distances.mean_embedding import MMD, mmd

__all__ = ["MMD", "kernels", "mmd"]
