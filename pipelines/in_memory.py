"""A whole dataset, or a few files, as one tensor of bytes, for what has to see all images at once."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from pipelines.dataset import ImageDataset
from pipelines.decoding.pil import decode
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import printable, read_file
from pipelines.errors import DataError, one_line
from pipelines.loading.loader import ImageLoader
from pipelines.pixels import to_uint8
from pipelines.registry import fit

_BATCH = 256


def read_pixels(
    dataset: ImageDataset,
    *,
    limit: int | None = None,
    seed: int = 0,
    backend: str = "auto",
    shard: int = 0,
    num_shards: int = 1,
) -> torch.Tensor:
    """All images as uint8 [N, 3, H, W], in the dataset's order, from the values that `ImageLoader` gives.

    If there are more than `limit`, only that many, at random: `seed` decides which. With several shards, those of part
    `shard` of `num_shards`, as `ImageLoader` has them.

    Raises DataError for an image that cannot be used, as the loader does; skipped ones are left out.
    """
    return read_numbered(dataset, limit=limit, seed=seed, backend=backend, shard=shard, num_shards=num_shards)[0]


def read_numbered(
    dataset: ImageDataset,
    *,
    limit: int | None = None,
    seed: int = 0,
    backend: str = "auto",
    shard: int = 0,
    num_shards: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `read_pixels` gives, and which images of the dataset they are, int64 [N]."""
    loader = ImageLoader(dataset, _BATCH, backend=backend, seed=seed, shard=shard, num_shards=num_shards)
    count = loader.num_images if limit is None else min(limit, loader.num_images)
    loader.shuffle = count < loader.num_images
    # All at once, so that too many are refused before the first is read.
    pixels = torch.empty(count, 3, dataset.image_size, dataset.image_size, dtype=torch.uint8)
    numbers = torch.empty(count, dtype=torch.int64)
    read = 0
    for images, indices in loader:
        part = images[: count - read]
        pixels[read : read + len(part)] = to_uint8(part)
        numbers[read : read + len(part)] = indices[: len(part)]
        read += len(part)
        if read == count:
            break
    return pixels[:read], numbers[:read]


def read_files(
    paths: Sequence[str | os.PathLike[str]], preprocessing: Preprocessing, dataset: str = "images"
) -> torch.Tensor:
    """Image files of any size as uint8 [N, 3, H, W], made like those of the data set `dataset` (see `registry.fit`).

    Raises DataError that names the first one that cannot be used.
    """
    images = []
    for path in paths:
        try:
            images.append(np.asarray(fit(dataset, decode(read_file(path)), preprocessing)))
        except (DataError, OSError, ValueError) as error:
            raise DataError(f"{printable(path)}: {one_line(error)}") from None
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
