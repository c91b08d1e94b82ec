"""The torch backend: one tensor that is sliced, or PIL decoding in worker processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pipelines.dataset import ArrayDataset, ImageDataset
from pipelines.errors import BadImage

SCALE = float(np.float32(1 / 127.5))
"""float32 reciprocal, because DALI multiplies by it too: both backends give the same bits, and exactly -1 and 1."""


def run(
    dataset: ImageDataset,
    batches: list[np.ndarray],
    device: torch.device,
    workers: int | None,
    bad_images: dict[int, BadImage],
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Yield (images, indices) for every batch of indices; `bad_images` collects what is skipped, by picture."""
    if isinstance(dataset, ArrayDataset):
        yield from _slices(dataset, batches, device)
        return
    raise NotImplementedError(type(dataset).__name__)


def _slices(
    dataset: ArrayDataset, batches: list[np.ndarray], device: torch.device
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    pictures_on_device = torch.from_numpy(dataset.images).to(device)
    for indices in batches:
        pictures, mirrored = dataset.pictures(indices)
        if is_range(pictures):
            images = pictures_on_device[pictures[0] : pictures[-1] + 1]
        else:
            images = pictures_on_device[torch.from_numpy(pictures).to(device)]
        yield normalise(images, mirrored), indices


def is_range(pictures: np.ndarray) -> bool:
    """Whether the pictures are consecutive, so that a slice shows them without a copy."""
    return pictures[-1] - pictures[0] == len(pictures) - 1 and bool((np.diff(pictures) == 1).all())


def normalise(pictures: torch.Tensor, mirrored: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] → float32 [n, 3, H, W] in [-1, 1], flipped left to right where `mirrored` (bool [n])."""
    images = pictures.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if mirrored.all():
        images = images.flip(3)
    elif mirrored.any():
        chosen = torch.from_numpy(np.flatnonzero(mirrored)).to(images.device)
        images[chosen] = images[chosen].flip(3)
    return images.sub_(127.5).mul_(SCALE)
