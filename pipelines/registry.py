"""`open_dataset`: every dataset of the engine by its name."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.dataset import ImageDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import printable
from pipelines.errors import DataError
from pipelines.sources.arrays import open_array_file, open_digits
from pipelines.sources.binaries import open_cifar10, open_stl10
from pipelines.sources.folder import open_folder
from pipelines.sources.lsun import open_lsun

DATASETS = ("digits", "cifar10", "stl10", "celeba", "lsun", "images")
ARRAY_SUFFIXES = (".npy", ".npz")
CELEBA_FOLDER = "img_align_celeba"
CELEBA_CROP = 160
"""Side of the centre square of CelebA's aligned 178×218 pictures that the paper uses."""


def open_dataset(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    image_size: int = 32,
    center_crop: int | None = None,
    horizontal_flip: bool = False,
    skip_bad_images: bool = False,
) -> ImageDataset:
    """Open a dataset of images, image_size × image_size pixels.

    Args:
        name: one of `DATASETS`.
        path: the folder or file. `digits` takes none; `cifar10` is downloaded (into the cache without a path).
        image_size: height and width of the images, in pixels.
        center_crop: side of the centre square that is cut out before the resize, in pixels; 160 for `celeba`.
        horizontal_flip: also show every picture mirrored, which doubles the length.
        skip_bad_images: leave out files that cannot be used and list them, instead of stopping at the first one.

    Raises:
        DataError: the dataset is missing, damaged or empty, or an option does not fit it.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}; choose one of {', '.join(DATASETS)}")
    if name == "celeba" and center_crop is None:
        center_crop = CELEBA_CROP
    preprocessing = Preprocessing(image_size=image_size, center_crop=center_crop, horizontal_flip=bool(horizontal_flip))
    if name == "digits":
        if path is not None:
            raise DataError(f"dataset 'digits' is built in and reads nothing from {path}; use the dataset 'images'")
        return open_digits(name, preprocessing)
    if name == "cifar10":
        return open_cifar10(name, None if path is None else Path(path).expanduser(), preprocessing)
    if path is None:
        raise DataError(f"dataset {name!r} needs a path (--data PATH)")
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{printable(path)}: no such file or folder; check the path of dataset {name!r}")
    if name == "stl10":
        return open_stl10(name, path, preprocessing)
    if name == "lsun":
        return open_lsun(name, path, preprocessing, skip_bad_images=skip_bad_images)
    if name == "celeba":
        folder = path / CELEBA_FOLDER if (path / CELEBA_FOLDER).is_dir() else path
        return open_folder(name, folder, preprocessing, labelled=False, skip_bad_images=skip_bad_images)
    if path.is_file():
        if path.suffix.lower() not in ARRAY_SUFFIXES:
            raise DataError(f"{printable(path)}: not a folder of images and not a .npy or .npz file")
        return open_array_file(name, path, preprocessing)
    return open_folder(name, path, preprocessing, skip_bad_images=skip_bad_images)
