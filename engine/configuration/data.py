"""The real images that a configuration names."""

from __future__ import annotations

from engine.configuration.config import Config
from pipelines import ImageDataset, open_dataset


def open_data(config: Config) -> ImageDataset:
    """The real images."""
    data = config.data
    return open_dataset(
        data.dataset,
        data.data,
        image_size=data.image_size,
        center_crop=data.center_crop,
        horizontal_flip=data.horizontal_flip,
        skip_bad_images=data.skip_bad_images,
    )
