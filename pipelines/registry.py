"""`open_dataset`: every data set of the engine by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from PIL import Image

from pipelines.dataset import ImageDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import printable
from pipelines.errors import DataError, one_line
from pipelines.sources.celeba import CENTER_CROP, open_celeba
from pipelines.sources.cifar10 import open_cifar10
from pipelines.sources.digits import fit_digit, open_digits
from pipelines.sources.fashion import fit_garment, open_fashion
from pipelines.sources.images import open_images
from pipelines.sources.lsun import open_lsun
from pipelines.sources.stl10 import open_stl10


class Opener(Protocol):
    """The function of one source that opens its data set."""

    def __call__(
        self, name: str, path: Path | None, preprocessing: Preprocessing, *, skip_bad_images: bool = False
    ) -> ImageDataset:
        """Open it; raise DataError if it is missing, damaged or empty, or if an option does not fit it."""
        ...


DATASETS: dict[str, Opener] = {
    "digits": open_digits,
    "cifar10": open_cifar10,
    "fashion": open_fashion,
    "stl10": open_stl10,
    "celeba": open_celeba,
    "lsun": open_lsun,
    "images": open_images,
}
"""Every data set by its name. To add one, write its opener in `pipelines/sources/` and name it here."""


_FIT = {"digits": fit_digit, "fashion": fit_garment}
"""How a picture becomes like those of a data set that has a margin of its own."""


def fit(name: str, picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """An RGB picture of any size as `open_dataset` shows those of the data set `name`.

    Where these get a margin, so does the picture, unless it has the images' size already: then it is like one of them,
    and it may be smaller than the crop.

    Raises DataError as `Preprocessing.geometry` does.
    """
    whole, crop = picture.size == (preprocessing.image_size, preprocessing.image_size), preprocessing.center_crop
    if whole and crop is not None and crop > preprocessing.image_size:
        return picture  # it has been cut out before
    if whole or name not in _FIT:
        return preprocessing.fit(picture)
    return _FIT[name](picture, preprocessing)


def usual_crop(name: str, center_crop: int | None) -> int | None:
    """The side of the centre square that `open_dataset` cuts out, given its argument."""
    return CENTER_CROP if center_crop is None and name == "celeba" else center_crop


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
        path: the folder or file, as docs/data.md says for each. `digits` takes none;
            `cifar10` and `fashion` are downloaded (into the cache without a path).
        image_size: height and width of the images, in pixels.
        center_crop: side of the centre square that is cut out before the resize, in pixels; 160 for `celeba`.
        horizontal_flip: also show every picture mirrored, which doubles the length.
        skip_bad_images: leave out files that cannot be used and list them, instead of stopping at the first one.

    Raises:
        DataError: the dataset is missing, damaged or empty, or an option does not fit it.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}; choose one of {', '.join(DATASETS)}")
    preprocessing = Preprocessing(image_size=image_size, center_crop=center_crop, horizontal_flip=bool(horizontal_flip))
    return DATASETS[name](name, _place(path), preprocessing, skip_bad_images=skip_bad_images)


def _place(path: str | os.PathLike[str] | None) -> Path | None:
    """The path with ~ as the home folder. An empty one would mean the working folder, which nobody asks for so."""
    if path is None:
        return None
    if not os.fspath(path):
        raise DataError("the path of the data set is empty; leave it out, or write '.' for this folder", "data")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # a user whom the system does not know
        raise DataError(f"{printable(path)}: {one_line(error)}; write the folder in full", "data") from None
