"""How a tap's activations lie in memory, seen as a matrix of images by features.

Operations on activations work on `[N, F]` rows in the *memory order* of these: (H, W, C) when they are channels_last,
(C, H, W) when they are contiguous. Buffers of per-feature values use the same order, so no operation ever permutes
anything; callers translate to the public (C, H, W) order at their border.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the rows of `x` [N, C, H, W] are read in (H, W, C) order.

    Tensors that are dense in both orders (C = 1, or H = W = 1) have one and the same row either way.
    """
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def feature_rows(x: Tensor) -> Tensor:
    """View of `x` [N, C, H, W] (or [N, C]) as [N, F] in memory order; never a copy.

    Raises ValueError if `x` is dense in neither order.
    """
    if is_channels_last(x) or x.is_contiguous():
        images = x.shape[0]
        features = x.numel() // images
        return x.as_strided((images, features), (features, 1))
    raise ValueError(
        f"x: activations must be contiguous or channels_last, got strides {x.stride()} for {tuple(x.shape)}"
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16 and bfloat16 activations, their own dtype otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
