"""What is compared of every map of features: its mean, mean and deviation, its means over a grid, or all of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.representation.extractor import Tap
from engine.support.errors import InputError

_GRID = re.compile(r"grid([1-9]\d{0,2})")
# Below 1e-3 a map hardly varies, and the slope of its deviation would be large and say nothing.
_VARIANCE_FLOOR = 1e-6


PerImageParts = tuple[Tensor, Tensor | None]
"""`g` and `slope` of `engine.representation.protocols.PerImage`."""


class Pool(Protocol):
    """From a tap's output y [n, C, H, W] to pooled features [n, f], and back for gradients.

    Attributes:
        reads_pooled: whether gradients need the pooled features, which are kept until backward then.
    """

    reads_pooled: bool

    def num_features(self, tap: Tap) -> int:
        """f."""
        ...

    def __call__(self, y: Tensor) -> Tensor:
        """Pooled features [n, f], float32 (float64 for float64 y)."""
        ...

    def gradient(self, g: Tensor, pooled: Tensor | None, tap: Tap) -> PerImageParts:
        """∂L/∂y for g = ∂L/∂pooled, with `pooled` what the call returned (None unless it is read); [n, f] both."""
        ...


class Grid:
    """Means over a grid of `side` × `side` cells, or of as many as a smaller map has.

    f = C · min(side, H) · min(side, W).

    With `side` 1 these are channel means, which lose where things are. Cells are those of
    `torch.nn.functional.adaptive_avg_pool2d`.
    """

    reads_pooled = False

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

    def gradient(self, g: Tensor, pooled: Tensor | None, tap: Tap) -> PerImageParts:
        """Every cell's gradient, shared out among its features."""
        channels, height, width = self._cells(tap)
        g = g.reshape(len(g), channels, height, width)
        if (height, width) == (1, 1):
            return g / (tap.shape[1] * tap.shape[2]), None
        # Products, which are the same bits every time; on a GPU the pooling's own backward adds in any order.
        down, across = (_shares(side, cells, g) for side, cells in zip(tap.shape[1:], (height, width), strict=True))
        return down @ g @ across.T, None


class MeanAndDeviation:
    """The mean m and the deviation s of every channel over its positions: f = 2·C, all means first.

        m = 1/(HW) Σ y          s = √(1/(HW) Σ (y − m)² + 1e-6)

    A map of a single position has no deviation: f = C there. The gradient is affine in every image's own features:
    ∂L/∂y = (g_m + g_s (y − m)/s)/(HW).
    """

    reads_pooled = True

    def num_features(self, tap: Tap) -> int:
        channels, height, width = tap.shape
        return channels if height * width == 1 else 2 * channels

    def __call__(self, y: Tensor) -> Tensor:
        y = _wide(y)
        if y.shape[2] * y.shape[3] == 1:
            return y.flatten(1)
        variance, mean = torch.var_mean(y, dim=(2, 3), correction=0)
        return torch.cat((mean, (variance + _VARIANCE_FLOOR).sqrt()), dim=1)

    def gradient(self, g: Tensor, pooled: Tensor | None, tap: Tap) -> PerImageParts:
        """See the class."""
        channels, height, width = tap.shape
        if height * width == 1:
            return g[:, :, None, None], None
        assert pooled is not None
        of_mean, of_deviation = torch.split(g, channels, dim=1)
        mean, deviation = torch.split(pooled, channels, dim=1)
        slope = of_deviation / (deviation * (height * width))
        constant = of_mean / (height * width) - slope * mean
        return constant[:, :, None, None], slope[:, :, None, None]


class Everything:
    """Every feature: f = C·H·W."""

    reads_pooled = False

    def num_features(self, tap: Tap) -> int:
        return tap.num_features

    def __call__(self, y: Tensor) -> Tensor:
        return _wide(y).flatten(1)

    def gradient(self, g: Tensor, pooled: Tensor | None, tap: Tap) -> PerImageParts:
        return g.reshape(len(g), *tap.shape), None


POOLS: dict[str, Pool] = {"mean": Grid(1), "mean+std": MeanAndDeviation(), "grid4": Grid(4), "none": Everything()}


def make_pool(name: str) -> Pool:
    """The pool of a name: one of `POOLS`, or "gridK" for K × K cells, K up to 999; InputError if it is none."""
    if (known := POOLS.get(name)) is not None:
        return known
    if (grid := _GRID.fullmatch(name)) is not None:
        return Grid(int(grid[1]))
    raise InputError("pool", f"{name!r} is not one of mean, mean+std, gridK (such as grid4), none")


def sizes(pool: Pool, taps: Sequence[Tap]) -> list[int]:
    """f of every tap; pooled features of an image are those of all taps, in order."""
    return [pool.num_features(tap) for tap in taps]


def _shares(side: int, cells: int, like: Tensor) -> Tensor:
    """[side, cells]: what of a cell's mean comes from each place, 1/(its places) or 0."""
    places = torch.eye(side, dtype=like.dtype, device=like.device)[None]
    return F.adaptive_avg_pool1d(places, cells)[0]


def _wide(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.float()
