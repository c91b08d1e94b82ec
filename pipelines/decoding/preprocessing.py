"""How a picture of any size becomes a square of `image_size`: one geometry, used by every backend.

    optional centre crop → resize of the shorter side (bilinear, antialiased: PIL's filter) → centre square

The sizes and offsets are rounded as torchvision's `CenterCrop` and `Resize` round them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from pipelines.errors import DataError

RESIZE_FILTER = "bilinear-antialias"
"""PIL's `BILINEAR`: a triangle whose support grows with the reduction, so nothing aliases."""

MAX_PIXELS = 89_478_485
"""Pictures with more pixels than this (PIL's own limit: 256 MiB of RGB) are refused, before and after the resize."""


class Geometry(NamedTuple):
    """Where the pixels of one picture come from and go to; all in whole pixels, (top, left) and (height, width)."""

    crop: tuple[int, int, int, int]
    """(top, left, height, width) of the part of the picture that is used."""
    resized: tuple[int, int]
    """(height, width) after the resize; the shorter one is `image_size`."""
    offset: tuple[int, int]
    """(top, left) of the final square inside the resized picture."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to every picture, for all datasets and backends. Raises `DataError` for values out of range."""

    image_size: int = 32
    """Height and width of the images, in pixels."""
    center_crop: int | None = None
    """Side of the centre square that is kept before the resize, in pixels; None keeps the whole picture."""
    horizontal_flip: bool = False
    """Count every picture twice, the second time mirrored left to right."""

    def __post_init__(self) -> None:
        size = self.image_size
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 8192:
            raise DataError(f"image_size must be a whole number of pixels from 1 to 8192, not {size!r}")
        crop = self.center_crop
        if crop is not None and (isinstance(crop, bool) or not isinstance(crop, int) or crop < 1):
            raise DataError(f"center_crop must be a positive whole number of pixels or None, not {crop!r}")

    def geometry(self, height: int, width: int) -> Geometry:
        """Sizes and offsets for a picture of height × width pixels.

        Raises:
            DataError: the picture is smaller than the crop, or too large or too elongated to be resized safely.
                The message says why; the caller knows the file.
        """
        if height < 1 or width < 1:
            raise DataError(f"the picture is empty ({width}×{height} pixels)")
        if height * width > MAX_PIXELS:
            raise DataError(f"{width}×{height} pixels are refused as a decompression bomb (limit {MAX_PIXELS:,})")
        top = left = 0
        if self.center_crop is not None:
            if min(height, width) < self.center_crop:
                raise DataError(f"{width}×{height} pixels are smaller than the centre crop {self.center_crop}")
            top, left = _middle(height, self.center_crop), _middle(width, self.center_crop)
            height = width = self.center_crop
        size = self.image_size
        short = min(height, width)
        resized = (size * height // short, size * width // short)
        if resized[0] * resized[1] > MAX_PIXELS:
            raise DataError(f"{width}×{height} pixels are too elongated to be resized to a shorter side of {size}")
        return Geometry((top, left, height, width), resized, (_middle(resized[0], size), _middle(resized[1], size)))

    def fit(self, picture: Image.Image) -> Image.Image:
        """An RGB picture of any size → RGB image_size × image_size, with PIL's filter: the reference of this project.

        Raises:
            DataError: as `geometry`.
        """
        crop, resized, offset = self.geometry(picture.height, picture.width)
        top, left, height, width = crop
        if (height, width) != (picture.height, picture.width):
            picture = picture.crop((left, top, left + width, top + height))
        if resized != (picture.height, picture.width):
            picture = picture.resize((resized[1], resized[0]), Image.Resampling.BILINEAR)
        if resized != (self.image_size, self.image_size):
            top, left = offset
            picture = picture.crop((left, top, left + self.image_size, top + self.image_size))
        return picture


def _middle(length: int, part: int) -> int:
    """First pixel of the centred part; half pixels go to the even side, as in torchvision's CenterCrop."""
    return round((length - part) / 2)
