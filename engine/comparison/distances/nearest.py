"""Nearest neighbours among many rows, in little memory."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kernels import select

_ROWS, _NUMBERS = 4096, 2**24
"""Rows of either side that are compared at a time: at most so many, of at most so many numbers."""


def nearest_rows(x: Tensor, y: Tensor, kernels: str | ModuleType = "auto") -> tuple[Tensor, Tensor]:
    """For every row of x [n, F] the nearest of y [m, F]: its number [n] int64, and ‖x_i − y_j‖² [n].

    As `kernels.nearest`, all rows compared; but whatever backend there is, beside x and y it takes no more memory than
    a few blocks of 4,096² distances. 16,384 images of 32×32 pixels among 65,536 take 1 GiB themselves.

    Args:
        kernels: the backend, by its name (see `kernels.select`) or as a module.
    """
    backend = select(kernels, x.device, x.dtype) if isinstance(kernels, str) else kernels
    block = max(min(_ROWS, _NUMBERS // max(x.shape[1], 1)), 1)
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    smallest: list[Tensor] = []
    for rows, found in zip(torch.split(x, block), torch.split(index, block), strict=True):
        best: Tensor | None = None
        for number, part in enumerate(torch.split(y, block)):
            where, squares = backend.nearest(rows, part)
            closer = torch.ones_like(where, dtype=torch.bool) if best is None else squares < best
            found.copy_(torch.where(closer, where + number * block, found))
            best = squares if best is None else torch.minimum(squares, best)
        assert best is not None
        smallest.append(best)
    return index, torch.cat(smallest)
