"""The handwritten digits that scikit-learn carries: the data set that needs no file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.dataset import ArrayDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import printable
from pipelines.errors import DataError


def open_digits(
    name: str, path: Path | None, preprocessing: Preprocessing, *, skip_bad_images: bool = False
) -> ArrayDataset:
    """The 1,797 handwritten digits that scikit-learn carries, 8×8 with values 0..16, labels 0..9.

    Each is enlarged to 3/4 of `image_size` (24×24 in 32×32) with PIL's bicubic filter, clipped to 0..255, and centred
    on black in three equal channels, so that an extractor sees strokes with a margin.

    Raises:
        DataError: there is a path or a crop, or the images are too small to show 8×8 digits.
    """
    if path is not None:
        raise DataError(f"dataset 'digits' is built in, and {printable(path)} is not read; use the dataset 'images'")
    if preprocessing.center_crop is not None:
        raise DataError("dataset 'digits' is drawn at the image size and takes no center_crop; leave it out")
    size = preprocessing.image_size
    if size < 11:
        raise DataError(f"dataset 'digits' needs an image_size of at least 11 pixels to show 8×8 digits, not {size}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    start, side = _place(size)
    images = np.zeros((len(digits.images), size, size, 3), dtype=np.uint8)
    for image, digit in zip(images, digits.images.astype(np.float32) * np.float32(255 / 16), strict=True):
        image[start : start + side, start : start + side] = _resized(digit, side)[..., None]
    return ArrayDataset(name, preprocessing, images, labels=digits.target, num_classes=10, resize_filter="bicubic")


def fit_digit(picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """An RGB picture's middle square as `open_digits` shows a digit: at 3/4 of the size, on black."""
    size = preprocessing.image_size
    start, side = _place(size)
    middle = Preprocessing(image_size=side, center_crop=min(picture.size)).geometry(picture.height, picture.width)
    top, left, height, width = middle.crop
    square = np.asarray(picture, dtype=np.float32)[top : top + height, left : left + width]
    fitted = np.zeros((size, size, 3), dtype=np.uint8)
    for channel in range(3):
        fitted[start : start + side, start : start + side, channel] = _resized(square[..., channel], side)
    return Image.fromarray(fitted)


def _resized(values: np.ndarray, side: int) -> np.ndarray:
    """float32 [h, w] → whole numbers from 0 to 255, [side, side]; nothing is rounded or clipped in between."""
    found = np.asarray(Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC))
    return np.rint(found.clip(0, 255))


def _place(size: int) -> tuple[int, int]:
    """The first row and column of a digit in an image of this size, and the digit's side."""
    side = round(size * 3 / 4)
    return (size - side) // 2, side
