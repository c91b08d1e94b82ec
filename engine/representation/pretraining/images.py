"""The images of pretraining: nine tenths to learn from, and one tenth, held out, to judge by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.representation.pretraining.shares import Rows
from engine.support.errors import InputError
from engine.support.pixels import to_float, to_uint8
from engine.training.progress import Progress
from engine.training.ranks import ALONE, Ranks
from pipelines import ImageDataset, ImageLoader, sent
from pipelines.dataset import ArrayDataset

_HELD_OUT = 10
"""One image in this many is held out."""
IN_MEMORY_BYTES = 4 * 2**30
"""Data sets of up to this many bytes are one uint8 tensor: on the device, or, of a GPU that has not four times as much
free, in the CPU's memory, from where every batch is sent."""
_READING_BATCH = 256
_BLACK = -1.0

Images = tuple[Tensor, Tensor]
"""float32 [n, 3, H, W] in [-1, 1], channels_last, on the device; and which pictures they show, int64 [n] on the CPU."""


@dataclass(frozen=True)
class Augmentation:
    """A random crop of the image padded with black, perhaps mirrored; applied to every training image.

    Attributes:
        padding: pixels added on each side before a window of the old size is cut out at random; 0 is no crop.
        flip: mirror every second image on average. Not for digits: a mirrored digit is another symbol.
    """

    padding: int
    flip: bool

    def __call__(self, images: Tensor, generator: torch.Generator, rows: Rows | None = None) -> Tensor:
        """Augment `images` [n, 3, H, W], which are `rows` of a minibatch, or all of it.

        The random numbers come from `generator`, a CPU generator: those of the whole minibatch, whoever has the others.
        """
        count, _, height, width = images.shape
        rows = Rows.all_of(images) if rows is None else rows
        pad, device = self.padding, images.device
        offsets = torch.randint(0, 2 * pad + 1, (2, rows.total, 1), generator=generator)
        mirrored = torch.rand((1, rows.total, 1), generator=generator) < (0.5 if self.flip else 0.0)
        # One copy of three numbers an image; what follows from them is computed on the device.
        top, left, mirrored = sent(torch.cat([offsets, mirrored])[:, rows.start : rows.stop], device)
        across = torch.arange(width, device=device)
        lines = top + torch.arange(height, device=device)
        columns = left + torch.where(mirrored.bool(), across.flip(0), across)
        padded = F.pad(images, (pad, pad, pad, pad), value=_BLACK).permute(0, 2, 3, 1)
        every = torch.arange(count, device=device)[:, None, None]
        # One gather in the order (N, H, W, C): crop and flip at once, and channels_last without a copy.
        return padded[every, lines[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class TrainingImages(Protocol):
    """A source of batches, of which a rank gets its share: as even as can be, in rank order, and empty if need be.

    Attributes:
        steps_per_epoch: batches of one pass over the training images.
    """

    steps_per_epoch: int

    def epoch(self, number: int, first: int) -> Iterator[Images]:
        """The batches of epoch `number` from batch `first` on, in an order decided by the seed and `number`."""
        ...

    def held_out(self) -> Iterator[Images]:
        """The images that `epoch` never shows."""
        ...


def open_images(
    dataset: ImageDataset,
    batch_size: int,
    *,
    seed: int,
    device: torch.device,
    loader: str = "auto",
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> TrainingImages:
    """Images in memory if they fit, streamed from their files otherwise.

    Args:
        batch_size: of the whole minibatch.
        loader: backend of `ImageLoader`.
        progress: tell how far it is while files are read into memory.
        ranks: the processes that share every minibatch. In memory each has all images, which they read together.

    Raises InputError if there are too few images to hold some out.
    """
    _check_count(dataset, dataset.num_pictures)
    if isinstance(dataset, ArrayDataset) or dataset.num_pictures * dataset.image_size**2 * 3 <= IN_MEMORY_BYTES:
        images, shown = _read(dataset, loader, progress, ranks)
        _check_count(dataset, len(images))
        fits = device.type != "cuda" or 4 * images.nbytes <= torch.cuda.mem_get_info(device)[0]
        images = images.to(device) if fits else images
        return _InMemory(images, shown, batch_size, seed=seed, device=device, ranks=ranks)
    return _Streamed(dataset, batch_size, seed=seed, device=device, loader=loader, ranks=ranks)


def _check_count(dataset: ImageDataset, count: int) -> None:
    if count < 2 * _HELD_OUT:
        raise InputError(
            "dataset",
            f"pretraining holds out one image in {_HELD_OUT} and needs at least {2 * _HELD_OUT} usable images, "
            f"{dataset.name} has {count}",
        )


class _InMemory:
    """All images as one uint8 tensor [N, H, W, 3], on `device` or on the CPU, and their numbers, int64 [N]."""

    def __init__(
        self,
        images: Tensor,
        shown: Tensor,
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ):
        self.images, self.shown, self.batch_size, self.seed, self.device = images, shown, batch_size, seed, device
        self.ranks = ranks
        # The same images are held out whatever the seed, so that runs compare.
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
        self.outside, self.inside = order.tensor_split([len(images) // _HELD_OUT])
        self.steps_per_epoch = -(-len(self.inside) // batch_size)
        if len(self.inside) % batch_size == 1 and self.steps_per_epoch > 1:
            self.steps_per_epoch -= 1  # a last batch of one image has no BatchNorm statistics

    def epoch(self, number: int, first: int) -> Iterator[Images]:
        permutation = np.random.default_rng([self.seed, number]).permutation(len(self.inside))
        batches = self.inside[torch.from_numpy(permutation)].split(self.batch_size)
        for chosen in batches[first : self.steps_per_epoch]:
            yield self._images(chosen)

    def held_out(self) -> Iterator[Images]:
        for chosen in self.outside.split(_READING_BATCH):
            yield self._images(chosen)

    def _images(self, chosen: Tensor) -> Images:
        chosen = chosen[self.ranks.share(len(chosen))]
        pictures = self.images[sent(chosen, self.images.device)]
        if pictures.device.type != self.device.type:
            pictures = sent(pictures, self.device)
        return to_float(pictures.permute(0, 3, 1, 2)), self.shown[chosen]


def _read(dataset: ImageDataset, backend: str, progress: bool, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """All pictures uint8 [N, H, W, 3], and their numbers int64 [N], without those that had to be skipped."""
    if isinstance(dataset, ArrayDataset):
        return torch.from_numpy(dataset.images), torch.arange(dataset.num_pictures)
    size = dataset.image_size
    images = torch.empty(dataset.num_pictures, size, size, 3, dtype=torch.uint8)
    seen = torch.zeros(dataset.num_pictures, dtype=torch.bool)
    together = _READING_BATCH * ranks.size
    loader = ImageLoader(dataset, together, backend=backend, part=ranks.rank, num_parts=ranks.size)
    show = progress and ranks.rank == 0
    with Progress("reading images", len(dataset), unit="images", show=show) as bar:
        for batch in loader:
            pictures, mirrored = (torch.from_numpy(array) for array in dataset.pictures(batch.indices.numpy()))
            numbers, _ = ranks.gather(pictures[~mirrored])
            images[numbers], _ = ranks.gather(to_uint8(batch.images)[~mirrored])
            seen[numbers] = True
            bar.advance(len(batch.indices) * ranks.size)
    return images[seen], seen.nonzero().flatten()


class _Streamed:
    """Every epoch decodes all images again, and drops the held-out ones from its batches."""

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
        loader: str,
        ranks: Ranks = ALONE,
    ):
        self.dataset = dataset
        options: Any = {"device": device, "backend": loader, "shuffle": True}
        options |= {"part": ranks.rank, "num_parts": ranks.size}
        self.loader = ImageLoader(dataset, batch_size, seed=seed, **options)
        self.steps_per_epoch = len(self.loader)
        # The first tenth of one fixed permutation.
        self.outside = ImageLoader(dataset, _READING_BATCH, shard=0, num_shards=_HELD_OUT, **options)
        order = np.random.default_rng([0, 0]).permutation(len(dataset))[: len(dataset) // _HELD_OUT]
        self.is_outside = np.zeros(dataset.num_pictures, dtype=bool)
        self.is_outside[dataset.pictures(order)[0]] = True

    def epoch(self, number: int, first: int) -> Iterator[Images]:
        self.loader.epoch = number
        for batch in self.loader.batches(first):
            pictures = self.dataset.pictures(batch.indices.numpy())[0]
            # Places, not a mask: how many images a mask on a GPU keeps, only the GPU knows.
            inside = torch.from_numpy(np.flatnonzero(~self.is_outside[pictures]))
            yield batch.images[sent(inside, batch.images.device)], torch.from_numpy(pictures)[inside]

    def held_out(self) -> Iterator[Images]:
        self.outside.epoch = 0
        for images, indices in self.outside.batches():
            pictures = self.dataset.pictures(indices.numpy())[0]
            assert self.is_outside[pictures].all()
            yield images, torch.from_numpy(pictures)
