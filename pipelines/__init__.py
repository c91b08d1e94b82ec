"""Datasets, and how their images reach the device: through DALI, or through a plain torch loader where it is absent.

dataset = open_dataset("images", "photos/", image_size=64, center_crop=160)
for images, indices in ImageLoader(dataset, 64, device="cuda", shuffle=True, seed=1):
    ...                                     # float32 [n, 3, 64, 64] in [-1, 1]; dataset.labels[indices] if any
"""

from pipelines.dataset import ImageDataset
from pipelines.datasets import DATASETS, open_dataset
from pipelines.digests import cache_folder
from pipelines.errors import BadImage, DataError
from pipelines.in_memory import read_pixels
from pipelines.loader import Batch, ImageLoader

__all__ = [
    "DATASETS",
    "BadImage",
    "Batch",
    "DataError",
    "ImageDataset",
    "ImageLoader",
    "cache_folder",
    "open_dataset",
    "read_pixels",
]
