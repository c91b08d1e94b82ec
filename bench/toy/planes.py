"""Laws of points in the plane, and how well a set of points draws one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

PARTS = 8
"""Modes of a law: Gaussians, or pieces of the spiral that are equally long."""
_CURVE_POINTS = 4000
_TRANSPORTED = 1000
_FAIR_SHARE = 0.2


@dataclass(frozen=True)
class Plane:
    """A law in the plane.

    Attributes:
        centres: points [k, 2] that all of it lies around: of Gaussians, or dense on a curve.
        part: [k], which of the `PARTS` each centre belongs to.
        deviation: of the Gaussian noise around them.
    """

    centres: Tensor
    part: Tensor
    deviation: float

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """The next points [count, 2] of a stream, independent of one another."""
        chosen = torch.randint(len(self.centres), (count,), generator=random)
        return self.centres[chosen] + self.deviation * torch.randn(count, 2, generator=random)


@dataclass(frozen=True)
class Drawing:
    """How well points draw a law.

    Attributes:
        near: the share of them that lies within three deviations of a centre.
        covered: how many parts have at least a fifth of their fair share of the points near them.
        distance: 2-Wasserstein to as many points of the law, by the best assignment.
    """

    near: float
    covered: int
    distance: float


def eight_gaussians() -> Plane:
    """On a circle of radius 2, with a deviation of 0.1."""
    angles = torch.arange(PARTS) * (2 * math.pi / PARTS)
    return Plane(2 * torch.stack([angles.cos(), angles.sin()], dim=1), torch.arange(PARTS), 0.1)


def spiral() -> Plane:
    """An arm r = 2.2 √t, a turn and a half long, with a deviation of 0.08; equally dense along its length."""
    t = torch.linspace(0.02, 1, 20 * _CURVE_POINTS, dtype=torch.float64)
    angle = 3 * math.pi * t
    curve = (2.2 * t.sqrt())[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    length = torch.cat([t.new_zeros(1), (curve[1:] - curve[:-1]).norm(dim=1).cumsum(0)])
    wanted = torch.linspace(0, 1, _CURVE_POINTS, dtype=torch.float64) * length[-1]
    chosen = curve[torch.searchsorted(length, wanted).clamp_max(len(curve) - 1)]
    return Plane(chosen.float(), torch.arange(_CURVE_POINTS) * PARTS // _CURVE_POINTS, 0.08)


PLANES: dict[str, Callable[[], Plane]] = {"eight-gaussians": eight_gaussians, "spiral": spiral}


def judge(plane: Plane, points: Tensor, seed: int = 1) -> Drawing:
    """See `Drawing`; of points [n, 2]. Those that aren't finite are near nothing, and make the distance infinite."""
    finite = points[points.isfinite().all(dim=1)]
    distances, nearest = torch.cdist(finite, plane.centres, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    near = distances < 3 * plane.deviation
    counts = torch.bincount(plane.part[nearest[near]], minlength=PARTS)
    distance = math.inf
    if len(finite) == len(points):
        compared = points[:_TRANSPORTED].double()
        centres = plane.centres[torch.arange(len(compared)) * len(plane.centres) // len(compared)]  # in equal shares
        noise = torch.randn(centres.shape, generator=torch.Generator().manual_seed(seed))
        real = (centres + plane.deviation * noise).double()
        costs = torch.cdist(compared, real).square().numpy()
        distance = float(np.sqrt(costs[linear_sum_assignment(costs)].mean()))
    enough = counts >= _FAIR_SHARE * len(points) / PARTS
    return Drawing(float(near.sum()) / len(points), int(enough.sum()), distance)
