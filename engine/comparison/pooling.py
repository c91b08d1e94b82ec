"""What is compared of every map of features: its mean, its means over a grid, or all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.representation.extractor import Tap


class Pool(Protocol):
    """From a tap's output y [n, C, H, W] to pooled features [n, f], and back for gradients."""

    def num_features(self, tap: Tap) -> int:
        """f."""
        ...

    def __call__(self, y: Tensor) -> Tensor:
        """Pooled features [n, f], float32 (float64 for float64 y)."""
        ...

    def gradient(self, g: Tensor, tap: Tap) -> Tensor:
        """∂L/∂y, or what broadcasts to [n, C, H, W], for g = ∂L/∂(pooled features) [n, f]."""
        ...


class Grid:
    """Means over a grid of `side` × `side` cells, or of as many as a smaller map has.

    f = C · min(side, H) · min(side, W).

    With `side` 1 these are channel means, which lose where things are. Cells are those of
    `torch.nn.functional.adaptive_avg_pool2d`.
    """

    def __init__(self, side: int):
        self.side = side

    def _cells(self, tap: Tap) -> tuple[int, int, int]:
        channels, height, width = tap.shape
        return channels, min(self.side, height), min(self.side, width)

    def num_features(self, tap: Tap) -> int:
        channels, height, width = self._cells(tap)
        return channels * height * width

    def __call__(self, y: Tensor) -> Tensor:
        side = (min(self.side, y.shape[2]), min(self.side, y.shape[3]))
        return F.adaptive_avg_pool2d(_wide(y), side).flatten(1)

    def gradient(self, g: Tensor, tap: Tap) -> Tensor:
        """Every cell's gradient, shared out among its features."""
        channels, height, width = self._cells(tap)
        g = g.reshape(len(g), channels, height, width)
        if (height, width) == (1, 1):
            return g / (tap.shape[1] * tap.shape[2])
        with torch.enable_grad():
            y = torch.zeros(len(g), *tap.shape, dtype=g.dtype, device=g.device, requires_grad=True)
            (found,) = torch.autograd.grad(F.adaptive_avg_pool2d(y, (height, width)), y, g)
        return found


class Everything:
    """Every feature: f = C·H·W."""

    def num_features(self, tap: Tap) -> int:
        return tap.num_features

    def __call__(self, y: Tensor) -> Tensor:
        return _wide(y).flatten(1)

    def gradient(self, g: Tensor, tap: Tap) -> Tensor:
        return g.reshape(len(g), *tap.shape)


POOLS: dict[str, Pool] = {"mean": Grid(1), "grid4": Grid(4), "none": Everything()}


def sizes(pool: Pool, taps: Sequence[Tap]) -> list[int]:
    """f of every tap; pooled features of an image are those of all taps, in order."""
    return [pool.num_features(tap) for tap in taps]


def _wide(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.float()
