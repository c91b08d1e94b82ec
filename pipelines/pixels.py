"""Bytes and values in [-1, 1]: this package's one way from each to the other."""

from __future__ import annotations

import numpy as np
import torch

HALF = 127.5
"""Half of 255: the byte that would be 0 in [-1, 1], and the deviation that DALI divides by."""
_SCALE = float(np.float32(1 / HALF))
"""float32 reciprocal, because DALI multiplies by it too: both backends give the same bits, and exactly -1 and 1."""


def to_float_(images: torch.Tensor) -> torch.Tensor:
    """Floats from 0 to 255 to [-1, 1], in place: (x − 127.5) · (1/127.5)."""
    return images.sub_(HALF).mul_(_SCALE)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floats in [-1, 1] as uint8 of the same shape: round(127.5 · (x + 1)), clipped to 0..255."""
    return images.add(1).mul_(HALF).round_().clamp_(0, 255).to(torch.uint8)
