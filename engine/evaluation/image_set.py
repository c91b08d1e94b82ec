"""Sets of images of one size, in memory or as files of a folder, for torch-fidelity."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from engine.evaluation.fidelity import fidelity
from engine.support.errors import InputError
from pipelines.decoding.pil import decode, look, say_first_frame
from pipelines.digests import printable, read_file
from pipelines.errors import BadImage, DataError, one_line
from pipelines.sources.listing import list_pictures, say_what_is_left_out

_SUFFIXES = "png,jpg,jpeg"
"""What torch-fidelity's own reading of a folder takes."""


class DrawnImages(Dataset[Tensor]):
    """Images uint8 [3, side, side] that are drawn while they are read, in order: only one batch of them is in memory.

    Args:
        draw: gives the batches, uint8 [n, side, side, 3], the same ones at every call.
        count: of images.
        side: in pixels.
    """

    def __init__(self, draw: Callable[[], Iterator[Tensor]], count: int, side: int):
        self.draw, self.count, self.side = draw, count, side
        self.first = self.end = 0  # of the batch
        self.batches: Iterator[Tensor] = iter(())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index < self.first or self.end == 0:
            self.batches, self.end = self.draw(), 0
        while index >= self.end:
            self.batch = next(self.batches)
            self.first, self.end = self.end, self.end + len(self.batch)
        return self.batch[index - self.first].permute(2, 0, 1)


class ImageSet:
    """Images of one size: a tensor uint8 [N, 3, H, W], images to be drawn, or the pictures in a folder and below it.

    Pictures are read as training reads them: upright, over white, 16 bits scaled to 8.

    Args:
        images: the tensor, the drawn images, or the folder's path.
        name: of what is no folder: the argument that errors name, or the file that it comes from.
        plain: read a folder as torch-fidelity's own command does: PNG and JPEG files alone, none below it, with PIL's
            bare conversion to RGB (which clips 16 bits, drops transparency, and leaves pictures lying on their side).

    Attributes:
        source: what torch-fidelity is given: a dataset, or the folder's path if `plain`.
        argument: what errors name.
        name: the same as text.
        count: N.
        size: (H, W).
        in_memory: whether `source` holds the pixels.
        read_otherwise: how many pictures `plain` would change or leave out, by kind.

    Raises InputError that names the folder or file if there are no images, one cannot be read, or sizes differ, and
    ValueError for a tensor that is not uint8 [N, 3, H, W].
    """

    def __init__(
        self, images: Tensor | DrawnImages | str | Path, name: str | Path = "images", *, plain: bool = False
    ):
        self.source: Dataset[Tensor] | str
        self.argument = Path(images) if isinstance(images, str | Path) else name
        self.name = str(self.argument)
        self.in_memory = not isinstance(images, str | Path)
        self.read_otherwise: Counter[str] = Counter()
        self._files: list[str] = []
        if isinstance(images, DrawnImages):
            self.source, self.count, self.size = images, len(images), (images.side, images.side)
            return
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
                raise ValueError(f"{name}: expected uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}")
            self.source = _Pixels(images)
            self.count, self.size = len(images), (images.shape[2], images.shape[3])
            return
        folder = Path(images)
        if not folder.is_dir():
            raise InputError(folder, "is not a folder of images")
        plain_files = fidelity().utils.glob_samples_paths(str(folder), False, _SUFFIXES, None, False)
        self._files = plain_files if plain else _pictures(folder)
        if not self._files:
            kind = "PNG or JPEG images (folders below it do not count)" if plain else "images"
            raise InputError(folder, f"holds no {kind}")
        self.source = str(folder) if plain else _Files(self._files)
        self.count = len(self._files)
        if not plain and (left_out := set(map(os.path.realpath, self._files)).difference(plain_files)):
            self.read_otherwise["left out"] = len(left_out)
        sizes = map(_stored_size if plain else self._size, self._files)
        self.size = next(sizes)
        for file, size in zip(self._files[1:], sizes, strict=True):
            if size != self.size:
                first, other = (printable(os.path.relpath(path, folder)) for path in (self._files[0], file))
                raise InputError(
                    folder,
                    f"holds images of different sizes: {first} is {shown_size(self.size)}, "
                    f"{other} is {shown_size(size)}",
                )

    def _size(self, file: str) -> tuple[int, int]:
        try:
            found = look(read_file(file))
        except (OSError, DataError) as error:
            raise _unreadable(file, error) from None
        if found.has_frames:
            say_first_frame([file])
        if found.unusual is not None:
            self.read_otherwise[found.unusual] += 1
        return found.size

    def damaged_file(self) -> BadImage | None:
        """The first file that cannot be decoded; None if there is none."""
        for file in self._files:
            try:
                decode(read_file(file))
            except (OSError, DataError) as error:
                return BadImage(file, one_line(error))
        return None


class _Pixels(Dataset[Tensor]):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class _Files(Dataset[Tensor]):
    """Pictures that are decoded when they are asked for, uint8 [3, H, W]; raises `OSError` and `DataError`."""

    def __init__(self, files: list[str]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = np.array(decode(read_file(self.files[index])))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def shown_size(size: tuple[int, int]) -> str:
    """(H, W) as "H×W"."""
    return f"{size[0]}×{size[1]}"


def _pictures(folder: Path) -> list[str]:
    names, others, unread = list_pictures(folder)
    if unread:
        raise InputError(Path(unread[0].path), f"{unread[0].reason}; make it readable")
    if names:
        say_what_is_left_out(folder, others)
    return [os.path.join(folder, name) for name in names]


def _stored_size(file: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: str, error: Exception) -> InputError:
    return InputError(Path(file), f"is not a readable image ({one_line(error)}); replace or remove it")
