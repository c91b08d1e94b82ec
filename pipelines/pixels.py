"""A dataset as one tensor of bytes, for what has to see all images at once."""

from __future__ import annotations

import torch

from pipelines.dataset import ImageDataset
from pipelines.loader import ImageLoader

_BATCH = 256


def read_pixels(dataset: ImageDataset, *, backend: str = "auto") -> torch.Tensor:
    """All images as uint8 [N, 3, H, W], in the dataset's order: round(127.5 · (x + 1)) of what `ImageLoader` gives.

    Raises DataError for an image that cannot be used, as the loader does; skipped ones are left out.
    """
    parts = [
        batch.images.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        for batch in ImageLoader(dataset, _BATCH, backend=backend)
    ]
    return torch.cat(parts)
