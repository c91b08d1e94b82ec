"""Criteria whose gradients are known, whatever the features are."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.representation.extractor import Extractor
from engine.representation.protocols import PerImage, Ranks, TapInput


class Weighted:
    """L = Σ w_nd x_nd, said to be 0.

    Args:
        weights: w [N, D], in the order of `extractor.features`.

    Attributes:
        taps: what was collected, tap by tap, in one chunk.
    """

    def __init__(self, extractor: Extractor, weights: Tensor):
        sizes = [tap.num_features for tap in extractor.taps]
        self.weights = [
            part.unflatten(1, tap.shape) for part, tap in zip(weights.split(sizes, dim=1), extractor.taps, strict=True)
        ]
        self.taps: dict[int, Tensor] = {}

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        self.taps[tap] = x.activate_().clone()

    def finish(self, ranks: Ranks) -> Tensor:
        return torch.zeros((), dtype=self.weights[0].dtype)

    def gradient(self, tap: int, images: slice) -> PerImage:
        return PerImage(self.weights[tap][images])

    def features(self) -> Tensor:
        """[N, D] in the order of `extractor.features`."""
        return torch.cat([self.taps[tap].flatten(1) for tap in range(len(self.weights))], dim=1)
