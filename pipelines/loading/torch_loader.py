"""The torch backend: one tensor that is sliced, or PIL decoding in worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipelines.dataset import ArrayDataset, EncodedDataset, ImageDataset
from pipelines.decoding.pil import load, say_first_frame
from pipelines.device import sent
from pipelines.errors import BadImage
from pipelines.pixels import to_float_

WORKERS = 2
"""Decoding processes, unless the caller says otherwise."""


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
    elif isinstance(dataset, EncodedDataset):
        yield from _decoded(dataset, batches, device, workers, bad_images)
    else:
        raise TypeError(f"unknown kind of dataset: {type(dataset).__name__}")


def is_range(pictures: np.ndarray) -> bool:
    """Whether the pictures are consecutive, so that a slice shows them without a copy."""
    return pictures[-1] - pictures[0] == len(pictures) - 1 and bool((np.diff(pictures) == 1).all())


def normalise(pictures: torch.Tensor, mirrored: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] → float32 [n, 3, H, W] in [-1, 1], flipped left to right where `mirrored` (bool [n])."""
    images = pictures.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if mirrored.all():
        images = images.flip(3)
    elif mirrored.any():
        chosen = sent(torch.from_numpy(np.flatnonzero(mirrored)), images.device)
        images[chosen] = images[chosen].flip(3)
    return to_float_(images)


def _slices(
    dataset: ArrayDataset, batches: list[np.ndarray], device: torch.device
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    pictures_on_device = torch.from_numpy(dataset.images).to(device)
    for indices in batches:
        pictures, mirrored = dataset.pictures(indices)
        if is_range(pictures):
            images = pictures_on_device[pictures[0] : pictures[-1] + 1]
        else:
            images = pictures_on_device[sent(torch.from_numpy(pictures), device)]
        yield normalise(images, mirrored), indices


class _Decoder(Dataset[np.ndarray]):
    """What a worker process does: whole batches of pictures, each decoded or found bad."""

    def __init__(self, dataset: EncodedDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, pictures: list[int]) -> tuple[np.ndarray, dict[int, BadImage], list[str]]:
        """Pictures → (uint8 [good, H, W, 3], what is wrong with the others, by picture, files with several frames).

        Arrays travel through a pipe: tensors would need shared memory, of which containers often have little. Errors
        travel as values, because an exception would arrive wrapped in the worker's stack.
        """
        good: list[np.ndarray] = []
        bad: dict[int, BadImage] = {}
        animations: list[str] = []
        for picture in pictures:
            loaded = load(self.dataset, picture, animations=animations)
            if isinstance(loaded, BadImage):
                bad[picture] = loaded
                if not self.dataset.skip_bad_images:
                    break
            else:
                good.append(loaded)
        size = self.dataset.image_size
        return np.stack(good) if good else np.empty((0, size, size, 3), np.uint8), bad, animations


class _Wanted:
    """The pictures of each batch, as lists, one batch at a time."""

    def __init__(self, dataset: EncodedDataset, batches: list[np.ndarray]) -> None:
        self.dataset = dataset
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.dataset.pictures(indices)[0].tolist() for indices in self.batches)


def _unchanged(batch: Any) -> Any:
    return batch


def _decoded(
    dataset: EncodedDataset,
    batches: list[np.ndarray],
    device: torch.device,
    workers: int | None,
    bad_images: dict[int, BadImage],
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    workers = WORKERS if workers is None else workers
    loader = DataLoader(
        _Decoder(dataset),
        batch_sampler=_Wanted(dataset, batches),
        num_workers=0 if len(batches) == 1 else min(workers, len(batches)),
        collate_fn=_unchanged,
    )
    for indices, (pictures, bad, animations) in zip(batches, loader, strict=True):
        say_first_frame(animations)
        if bad and not dataset.skip_bad_images:
            raise next(iter(bad.values())).error()
        bad_images.update(bad)
        kept = indices[~np.isin(indices % dataset.num_pictures, list(bad))] if bad else indices
        _, mirrored = dataset.pictures(kept)
        yield normalise(sent(torch.from_numpy(pictures), device), mirrored), kept
