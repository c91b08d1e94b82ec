"""Moments of a whole dataset: float64 accumulators that every batch's features are merged into.

Per-batch moments in float32 would cost up to 1e-4 of the variance of features whose mean is large, or that are rarely
on. Here all sums are in float64, centred on the running mean, whatever the features' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from engine.comparison.distances.moments import Moments
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.memory_order import FeatureOrder
from engine.representation.protocols import TapInput


class DatasetCollector:
    """The moments of every tap over a whole dataset, in float64 and in memory order (a `ReferenceCollector`).

    Every batch of n images is merged into the N before it (Chan, Golub, LeVeque 1979):

        δ = mean_batch − mean,  mean ← mean + δ n/(N+n),  M2 ← M2 + M2_batch + δ² N n/(N+n)

    Args:
        extractor: whose taps are collected, as it runs (`FeaturePass.prepared`).
        order: of its features.
        kernels: the backend, whose `dataset_moments` merges.
        images: how many are expected, which decides what is worth compiling.
    """

    def __init__(self, extractor: Extractor, order: FeatureOrder, kernels: ModuleType, images: int):
        self.order, self.kernels, self.images = order, kernels, images
        self.mean = torch.zeros(extractor.num_features, dtype=torch.float64, device=extractor.device)
        self.m2 = torch.zeros_like(self.mean)
        self.means, self.m2s = order.slices(self.mean), order.slices(self.m2)
        self.count = 0

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        self.kernels.dataset_moments(
            x.x, self.means[tap], self.m2s[tap], self.count, x.bias, x.residual, x.activation, self.images
        )

    def end_batch(self, indices: Tensor) -> None:
        """All taps have seen the batch: its images count from now on."""
        self.count += len(indices)

    def state(self) -> dict[str, Tensor]:
        """Mean and M2, in memory order, and how many images they are of."""
        return {"mean": self.mean, "m2": self.m2, "count": torch.tensor(self.count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; ValueError if it is of other features."""
        mean, m2 = state["mean"], state["m2"]
        if mean.shape != self.mean.shape or m2.shape != mean.shape or mean.dtype != torch.float64:
            raise ValueError("state: is of other features")
        self.mean.copy_(mean)
        self.m2.copy_(m2)
        self.count = int(state["count"])

    def result(self, fingerprint: Mapping[str, str], skipped: Sequence[str]) -> Moments:
        mean, m2 = (self.order.to_public(buffer) for buffer in (self.mean, self.m2))
        return Moments(self.count, mean, m2, fingerprint, skipped)


def fake_target(num_features: int, fill: Callable[..., Tensor] = torch.zeros) -> Moments:
    """A target of `fill(num_features)`, for models of a step that look at shapes alone."""
    return Moments(2, fill(num_features, dtype=torch.float64), fill(num_features, dtype=torch.float64))


class MomentsKind:
    """The target: moments of every feature (`engine.comparison.reference.protocols.Kind`)."""

    entries: ClassVar[dict[str, str]] = {}

    def collector(self, feature_pass: FeaturePass, images: int) -> DatasetCollector:
        """See `Kind.collector`."""
        order = FeatureOrder(feature_pass.prepared.taps)
        return DatasetCollector(feature_pass.prepared, order, feature_pass.kernels, images)

    def finished(self, collected: Moments) -> Moments:
        """See `Kind.finished`."""
        return collected

    def load(self, path: str | Path, expected: Mapping[str, str] | None = None) -> Moments:
        """See `Moments.load`."""
        return Moments.load(path, expected)
