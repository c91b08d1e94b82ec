"""Each kernel for a single pair of rows, and the matrix of all pairs by a double loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.comparison.distances import kernels
from engine.comparison.distances.kernels import Kernel

Pair = Callable[[Tensor, Tensor], Tensor]  # x [F], y [F] → []

# Each kernel as one writes it for a single pair of rows.
PAIRS: dict[str, tuple[Kernel, Pair]] = {
    "gaussian": (
        kernels.gaussian(bandwidths=(0.7, 2.0)),
        lambda x, y: sum(torch.exp(-(x - y).square().sum() / (2 * s**2)) for s in (0.7, 2.0)),
    ),
    "rational-quadratic": (
        kernels.rational_quadratic(),
        lambda x, y: sum((1 + (x - y).square().sum() / (2 * a)) ** -a for a in (0.2, 0.5, 1.0, 2.0, 5.0)),
    ),
    "rational-quadratic-linear": (
        kernels.rational_quadratic_linear((0.5, 2.0)),
        lambda x, y: (x * y).sum() + sum((1 + (x - y).square().sum() / (2 * a)) ** -a for a in (0.5, 2.0)),
    ),
    "imq": (
        kernels.imq(scales=(0.3, 4)),
        lambda x, y: sum(c / (c + (x - y).square().sum()) for c in (0.3, 4)),
    ),
    "polynomial": (kernels.polynomial(degree=3), lambda x, y: ((x * y).sum() / len(x) + 1) ** 3),
    "linear": (kernels.linear(), lambda x, y: (x * y).sum()),
    # torch's norm has the subgradient 0 at 0, too.
    "energy": (kernels.energy(), lambda x, y: -torch.linalg.vector_norm(x - y)),
}


def looped(pair: Pair, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([torch.stack([pair(one, other) for other in y]) for one in x])
