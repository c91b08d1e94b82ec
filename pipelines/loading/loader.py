"""`ImageLoader`: the images of a dataset in batches, each exactly once per epoch over all shards and parts together."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch

from pipelines.dataset import EncodedDataset, Fingerprint, ImageDataset
from pipelines.errors import BadImage, DataError
from pipelines.loading import torch_loader

BACKENDS = ("auto", "dali", "torch")
_PIP = "pip install 'gfmn-engine[dali]'"
log = logging.getLogger("gfmn")


class Batch(NamedTuple):
    """images float32 [n, 3, H, W] in [-1, 1] on the loader's device; indices int64 [n] on the CPU, into the dataset."""

    images: torch.Tensor
    indices: torch.Tensor


class ImageLoader:
    """Streams a dataset in batches.

    Several loaders can share an epoch in two ways. Shards cut the order of the images into pieces, each with batches of
    its own: right where batches don't matter. Parts share every batch: its rows, in order, are dealt out as evenly as
    can be (`rows_of`), so all parts together yield the batches of a single loader, with any number of parts.

    Args:
        dataset: from `open_dataset`.
        batch_size: images per batch, over all parts; the last batch of an epoch may be shorter, and is never empty.
        device: where the images go. On CUDA the DALI backend decodes there too.
        backend: "dali", "torch", or "auto": DALI where it can be imported, else torch with one warning. For arrays in
            memory both give the same bits on a CPU (on a GPU DALI may round product and sum at once), and torch, which
            slices one tensor, is the faster one.
        shuffle: a new permutation in every epoch, decided by `seed` and the epoch's number alone.
        shard, num_shards: this loader yields piece `shard` of `num_shards` nearly equal pieces of the same order.
        part, num_parts: this loader yields share `part` of `num_parts` of the rows of every batch. With several, all of
            them yield as many batches, so a share that is empty, or has no good image, is an empty batch.
        drop_last: leave out a last batch that is shorter than `batch_size`.
        workers: decoding threads (DALI: one per CPU) or processes (torch: 2). The images do not depend on it.

    Raises:
        DataError: an argument is out of range, or a backend or device is not available. While iterating: the first
            file that cannot be used, unless the dataset skips bad images; `bad_images` lists those.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        shuffle: bool = False,
        seed: int = 0,
        shard: int = 0,
        num_shards: int = 1,
        part: int = 0,
        num_parts: int = 1,
        drop_last: bool = False,
        workers: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {batch_size}")
        if not 0 <= shard < num_shards:
            raise DataError(f"shard must be from 0 to num_shards - 1 = {num_shards - 1}, not {shard}")
        if not 0 <= part < num_parts:
            raise DataError(f"part must be from 0 to num_parts - 1 = {num_parts - 1}, not {part}")
        if seed < 0:
            raise DataError(f"seed must not be negative, not {seed}")
        if workers is not None and workers < 0:
            raise DataError(f"workers must not be negative, not {workers}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DataError(f"device {str(device)!r} is not available: torch sees no CUDA device; use device 'cpu'")
        self.backend = _resolve_backend(backend)
        self.shuffle = shuffle
        self.seed = seed
        self.shard = shard
        self.num_shards = num_shards
        self.part = part
        self.num_parts = num_parts
        self.drop_last = drop_last
        self.workers = workers
        self.epoch = 0
        """Number of the next epoch; set it to repeat or to continue an interrupted sequence of epochs."""
        self.position = 0
        """Batches of the current epoch that were yielded or had no good image: `batches(position)` of the same epoch
        continues from here, with any number of parts."""
        self._bad_images: dict[int, BadImage] = {}

    @property
    def bad_images(self) -> list[BadImage]:
        """The files left out so far, each once, in dataset order; empty unless the dataset skips bad images."""
        return [*self.dataset.bad_images, *(bad for _, bad in sorted(self._bad_images.items()))]

    @property
    def num_images(self) -> int:
        """Images in one epoch of this shard and part, bad ones included."""
        return sum(map(len, self._batches(np.arange(len(self.dataset)), 0)))

    def __len__(self) -> int:
        count = len(self._piece(np.arange(len(self.dataset))))
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The batches of the next epoch from batch number `first` on, so that an interrupted pass can resume."""
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.dataset))
        self.epoch += 1
        self.position = first
        return self._run(self._batches(order, first))

    def fingerprint(self) -> Fingerprint:
        """The dataset's fingerprint and the decoder: JPEG decoders and resizers differ in the last bits."""
        decoder = "none"
        if isinstance(self.dataset, EncodedDataset):
            decoder = "pil" if self.backend == "torch" else f"dali-{self.device.type}"
        return self.dataset.fingerprint() | {"decoder": decoder}

    def _piece(self, order: np.ndarray) -> np.ndarray:
        count = len(order)
        return order[self.shard * count // self.num_shards : (self.shard + 1) * count // self.num_shards]

    def _batches(self, order: np.ndarray, first: int) -> list[np.ndarray]:
        """This part's rows of every batch from number `first` on, for the images of an epoch in their order."""
        piece = self._piece(order)
        starts = range(first * self.batch_size, len(self) * self.batch_size, self.batch_size)
        batches = (piece[start : start + self.batch_size] for start in starts)
        return [batch[rows_of(len(batch), self.part, self.num_parts)] for batch in batches]

    def _run(self, batches: list[np.ndarray]) -> Iterator[Batch]:
        with contextlib.closing(self._read([batch for batch in batches if len(batch)])) as reading:
            for wanted in batches:
                read = next(reading) if len(wanted) else None
                self.position += 1
                if read is not None and len(read[1]):
                    yield Batch(read[0], torch.from_numpy(read[1]))
                elif self.num_parts > 1:
                    yield self._nothing()
            next(reading, None)  # lets it come to its end

    def _read(self, batches: list[np.ndarray]) -> Generator[tuple[torch.Tensor, np.ndarray], None, None]:
        """The good images, and their indices, of batches that ask for at least one image each."""
        if not batches:
            return
        if self.backend == "dali":
            from pipelines.loading import dali_loader

            run = dali_loader.run
        else:
            run = torch_loader.run
        yield from run(self.dataset, batches, self.device, self.workers, self._bad_images)

    def _nothing(self) -> Batch:
        size = self.dataset.image_size
        return Batch(torch.empty((0, 3, size, size), device=self.device), torch.empty(0, dtype=torch.int64))


def rows_of(count: int, part: int, num_parts: int) -> slice:
    """Which of the `count` rows of a batch are those of `part`: consecutive, in the parts' order, as even as can be."""
    least, more = divmod(count, num_parts)
    start = part * least + min(part, more)
    return slice(start, start + least + (part < more))


def dali_is_importable() -> bool:
    """Whether NVIDIA DALI is installed for this Python."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError):  # OSError: one of its libraries cannot be loaded
        return False
    return True


def release_pools() -> None:
    """Give back what DALI's memory pools keep for later pipelines, on the device and pinned; nothing without DALI.

    Pipelines that run keep what they use.
    """
    backend = sys.modules.get("nvidia.dali.backend")
    if backend is not None:
        backend.ReleaseUnusedMemory()


def _resolve_backend(backend: str) -> str:
    if backend not in BACKENDS:
        raise DataError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "torch":
        return backend
    if dali_is_importable():
        return "dali"
    if backend == "dali":
        raise DataError(f"backend 'dali' needs NVIDIA DALI, which is not installed: {_PIP}; or use backend 'torch'")
    _say_torch_once()
    return "torch"


@functools.cache
def _say_torch_once() -> None:
    log.warning("NVIDIA DALI is not installed: images come through the torch loader (%s)", _PIP)
