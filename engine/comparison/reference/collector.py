"""Moments of a whole dataset: float64 accumulators that every batch's features are merged into.

Per-batch moments in float32 would cost up to 1e-4 of the variance of features whose mean is large, or that are rarely
on. Here all sums are in float64, centred on the running mean, whatever the features' dtype.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from engine.comparison.moment_matching import FeatureOrder
from engine.representation.extractor import Extractor


class DatasetCollector:
    """The moments of every tap over a whole dataset, in float64 and in memory order (a `feature_pass.Collector`).

    Every batch of n images is merged into the N before it (Chan, Golub, LeVeque 1979):

        δ = mean_batch − mean,  mean ← mean + δ n/(N+n),  M2 ← M2 + M2_batch + δ² N n/(N+n)

    Args:
        extractor: whose taps are collected, as it runs (`FeaturePass.prepared`).
        order: of its features.
        kernels: the backend, whose `dataset_moments` merges.
        images: how many are expected, which decides what is worth compiling.
    """

    def __init__(self, extractor: Extractor, order: FeatureOrder, kernels: ModuleType, images: int):
        self.kernels = kernels
        self.images = images
        self.activations = [site.to_apply for site in extractor.sites]
        self.mean = torch.zeros(extractor.num_features, dtype=torch.float64, device=extractor.device)
        self.m2 = torch.zeros_like(self.mean)
        self.means, self.m2s = order.slices(self.mean), order.slices(self.m2)
        self.count = 0
        self._arriving = 0

    def collect(self, tap: int, y: Tensor, residual: Tensor | None) -> None:
        """See `engine.representation.feature_pass.Collector`."""
        self.kernels.dataset_moments(
            y, self.means[tap], self.m2s[tap], self.count, residual, self.activations[tap], self.images
        )
        self._arriving = len(y)

    def end_batch(self) -> None:
        """All taps have seen the batch: its images count from now on."""
        self.count, self._arriving = self.count + self._arriving, 0
