"""The nearest real images of samples in a feature space, and the measure that tells a copy from a likeness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.protocols import TapInput
from engine.support.pixels import to_float

Features = Callable[[Tensor], Tensor]
"""Images uint8 [N, 3, H, W] → features [N, F] on the CPU."""
CLOSER = 0.95
"""A sample is suspiciously close if this share of real images is farther from its own nearest neighbour."""
_BLOCK = 128  # queries at a time
_SPARE = 3  # candidates beyond k


@dataclass(frozen=True)
class NearestImages:
    """Samples and the real images that lie nearest to them.

    Attributes:
        samples: uint8 [N, 3, H, W].
        real: uint8 [R, 3, H, W], all that were compared with.
        indices: int64 [N, k] into `real`, nearest first.
        distances: [N, k].
        yardstick: [R], the distance from every real image to the nearest *other* one.
    """

    samples: Tensor
    real: Tensor
    indices: Tensor
    distances: Tensor
    yardstick: Tensor

    @property
    def farther(self) -> Tensor:
        """[N]: the share of real images that are farther from their nearest neighbour than each sample from its own."""
        ordered = self.yardstick.sort().values
        return 1 - torch.searchsorted(ordered, self.distances[:, 0].contiguous(), right=True) / len(ordered)

    @property
    def num_closer(self) -> int:
        """Samples that are closer to a real image than 95% of real images are to their own neighbours."""
        return int((self.farther >= CLOSER).sum())

    @property
    def num_copies(self) -> int:
        """Samples that equal one of their nearest real images in every pixel."""
        same = (self.real[self.indices] == self.samples.unsqueeze(1)).flatten(2).all(dim=2)
        return int(same.any(dim=1).sum())

    def quantile(self, q: float) -> float:
        """The distance of the yardstick below which the share `q` of it lies."""
        ordered = self.yardstick.sort().values
        return float(ordered[min(int(q * len(ordered)), len(ordered) - 1)])


def nearest_images(samples: Tensor, real: Tensor, features: Features, *, k: int = 5) -> NearestImages:
    """Find the `k` nearest real images of every sample, both uint8 [n, 3, H, W].

    Every feature is divided by its deviation over the real images, so that none counts for its scale; features that
    are the same for all of them are left out. The distance is Euclidean. Raises ValueError for fewer than two real
    images.
    """
    if len(real) < 2:
        raise ValueError(f"real: at least two images are needed, got {len(real)}")
    of_real, of_samples = features(real).float(), features(samples).float()
    deviation, mean = torch.std_mean(of_real, dim=0, correction=0)
    used = deviation > 1e-6 * mean.abs()
    of_real, of_samples = (((x - mean) / deviation)[:, used] for x in (of_real, of_samples))
    indices, distances = nearest_rows(of_samples, of_real, min(k, len(real)))
    _, others = nearest_rows(of_real, of_real, 1, skip_self=True)
    return NearestImages(samples, real, indices, distances, others[:, 0])


def nearest_rows(queries: Tensor, references: Tensor, k: int, *, skip_self: bool = False) -> tuple[Tensor, Tensor]:
    """Indices int64 [N, k] and Euclidean distances [N, k] of the nearest `references` [R, F] to `queries` [N, F].

    Candidates come from |q|² + |r|² − 2qr, which is fast and loses digits where q ≈ r; their distances are then
    computed from the differences. With `skip_self` query i is not its own neighbour.
    """
    squares = references.square().sum(dim=1)
    candidates = min(k + _SPARE, len(references) - skip_self)
    indices, distances = [], []
    for start in range(0, len(queries), _BLOCK):
        q = queries[start : start + _BLOCK]
        squared = torch.addmm(squares, q, references.T, alpha=-2)
        if skip_self:
            rows = torch.arange(len(q))
            squared[rows, start + rows] = torch.inf
        found = squared.topk(candidates, largest=False).indices
        exact = torch.stack([(q - references[column]).norm(dim=1) for column in found.T], dim=1)
        exact, order = exact.sort(dim=1, stable=True)
        indices.append(found.gather(1, order)[:, :k])
        distances.append(exact[:, :k])
    return torch.cat(indices), torch.cat(distances)


def channel_means(extractor: Extractor, batch_size: int = 64) -> Features:
    """The extractor's taps, each averaged over positions to its channels, side by side: [N, ΣC]."""
    feature_pass = FeaturePass(extractor)

    def of_batch(images: Tensor) -> Tensor:
        collector = _ChannelMeans()
        feature_pass.collect(to_float(images.to(extractor.device)), collector)
        return torch.cat(collector.means, dim=1).cpu()

    return lambda images: torch.cat([of_batch(part) for part in images.split(batch_size)])


class _ChannelMeans:
    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        self.means.append(x.activate_().float().mean(dim=(2, 3)))
