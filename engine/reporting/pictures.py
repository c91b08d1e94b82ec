"""Grids of images as PNG files, few and small enough for a page."""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from engine.training.run_folder import COLUMNS, RunFolder

log = logging.getLogger("gfmn")

_GRIDS = 24  # at most, of the samples over time
_GRIDS_BYTES = 2_000_000  # all of them together
_STEP = re.compile(r"step_(\d+)\.png")


@dataclass(frozen=True)
class SamplesOverTime:
    """The chosen grids as (step, picture), and how many grids the run's folder holds."""

    pictures: list[tuple[int, Picture]]
    available: int


def samples_over_time(run: RunFolder, size: int) -> SamplesOverTime:
    """The grids of images of `size` pixels that training wrote, cut and chosen so that the page stays small."""
    files = sorted(
        (int(match[1]), path) for path in run.samples.glob("step_*.png") if (match := _STEP.fullmatch(path.name))
    )
    opened = []
    for step, path in evenly(files, _GRIDS):
        try:
            with Image.open(path) as picture:
                opened.append((step, picture.convert("RGB")))
        except (OSError, SyntaxError, ValueError):
            log.warning("%s: left out of the report, it is not a readable image", path)
    side = largest_side([picture for _, picture in opened], size, _GRIDS_BYTES, (8, 6, 4))
    if side is None:
        opened = evenly(opened, _GRIDS // 2)
        side = largest_side([picture for _, picture in opened], size, _GRIDS_BYTES, (4, 3)) or 2
    return SamplesOverTime([(step, upper_left(picture, size, side)) for step, picture in opened], len(files))


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, the first and the last among them, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


@dataclass(frozen=True)
class Picture:
    """A grid of images as a PNG.

    Attributes:
        png: its bytes.
        width, height: in pixels.
        count: images in it.
        cut: whether only a part of the grid is left.
    """

    png: bytes
    width: int
    height: int
    count: int
    cut: bool


def largest_side(pictures: Sequence[Image.Image], size: int, limit: int, sides: Sequence[int]) -> int | None:
    """The first of `sides` at which the upper left parts of `pictures` have about `limit` bytes together, or None.

    All are taken to be as large as the last one.
    """
    return next(
        (
            side
            for side in sides
            if not pictures or len(upper_left(pictures[-1], size, side).png) * len(pictures) <= limit
        ),
        None,
    )


def upper_left(picture: Image.Image, size: int, side: int = COLUMNS) -> Picture:
    """The first `side` rows and columns of a grid of images of `size` pixels."""
    pitch = size + 2
    part = picture.crop((0, 0, min(side * pitch + 2, picture.width), min(side * pitch + 2, picture.height)))
    count = (part.width // pitch) * (part.height // pitch)
    return Picture(as_png(part), *part.size, count, part.size != picture.size)


def as_picture(pixels: Tensor) -> Image.Image:
    """An image uint8 [3, H, W] as PIL has it."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def as_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file, as small as PIL makes it."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as a data: URI, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
