"""Data sets, and loaders that bring their images to the device: DALI, or plain torch where DALI is not installed.

dataset = open_dataset("images", "photos/", image_size=64, center_crop=160)
for images, indices in ImageLoader(dataset, 64, device="cuda", shuffle=True, seed=1):
    ...                                     # float32 [n, 3, 64, 64] in [-1, 1]; dataset.labels[indices] if any
"""

from pipelines.dataset import ImageDataset
from pipelines.device import sent
from pipelines.digests import cache_folder, cache_is_kept, cached, named_cache_folder, temporary_folder
from pipelines.errors import BadImage, DataError
from pipelines.in_memory import read_files, read_numbered, read_pixels
from pipelines.loading.loader import Batch, ImageLoader, release_pools
from pipelines.loading.stream import ImageStream
from pipelines.registry import DATASETS, open_dataset, usual_crop

__all__ = [
    "DATASETS",
    "BadImage",
    "Batch",
    "DataError",
    "ImageDataset",
    "ImageLoader",
    "ImageStream",
    "cache_folder",
    "cache_is_kept",
    "cached",
    "named_cache_folder",
    "open_dataset",
    "read_files",
    "read_numbered",
    "read_pixels",
    "release_pools",
    "sent",
    "temporary_folder",
    "usual_crop",
]
