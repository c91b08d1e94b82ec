"""A whole dataset as one tensor of bytes, for what has to see all images at once."""

from __future__ import annotations

import torch

from pipelines.dataset import ImageDataset
from pipelines.loading.loader import ImageLoader
from pipelines.pixels import to_uint8

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
    loader = ImageLoader(dataset, _BATCH, backend=backend, seed=seed, shard=shard, num_shards=num_shards)
    count = loader.num_images if limit is None else min(limit, loader.num_images)
    loader.shuffle = count < loader.num_images
    # All at once, so that too many are refused before the first is read.
    pixels = torch.empty(count, 3, dataset.image_size, dataset.image_size, dtype=torch.uint8)
    read = 0
    for images, _ in loader:
        part = images[: count - read]
        pixels[read : read + len(part)] = to_uint8(part)
        read += len(part)
        if read == count:
            break
    return pixels[:read]
