"""Sets of images of one size, in memory or in files, for torch-fidelity."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.evaluation.fidelity import fidelity
from engine.support.errors import InputError
from pipelines.dataset import EncodedImages
from pipelines.decoding.pil import decode, look, say_first_frame, stored_size
from pipelines.digests import printable
from pipelines.errors import BadImage, DataError, one_line
from pipelines.sources.folder import ImageFiles
from pipelines.sources.listing import list_pictures, say_what_is_left_out

_PLAIN_SUFFIXES = "png,jpg,jpeg"


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
    """Images of one size: a tensor uint8 [N, 3, H, W], images to be drawn, encoded pictures, or those in a folder and
    the folders below it.

    Pictures are read as training reads them: upright, over white, 16 bits scaled to 8.

    Args:
        images: the tensor, the drawn images, the pictures, or the folder's path.
        name: the argument that errors name, or the file that the images come from. A folder has its path.
        plain: read a folder as torch-fidelity's own command does: the PNG and JPEG files in it, none below it, with
            PIL's bare conversion to RGB, which clips 16 bits, drops transparency and turns nothing.

    Attributes:
        source: what torch-fidelity is given: a dataset, or the folder's path if `plain`.
        argument: what errors name.
        name: the same as text.
        count: N.
        size: (H, W).
        in_memory: whether `source` holds the pixels.
        read_otherwise: how many pictures of a folder `plain` would change or leave out, by kind.

    Raises InputError that names the folder or file if there are no images, one cannot be read, or sizes differ, and
    ValueError for a tensor that is not uint8 [N, 3, H, W].
    """

    def __init__(
        self,
        images: Tensor | DrawnImages | EncodedImages | str | Path,
        name: str | Path = "images",
        *,
        plain: bool = False,
    ):
        self.source: Dataset[Tensor] | str
        self.argument = Path(images) if isinstance(images, str | Path) else name
        self.name = str(self.argument)
        self.in_memory = isinstance(images, Tensor | DrawnImages)
        self.read_otherwise: Counter[str] = Counter()
        self._files: EncodedImages | None = None
        if isinstance(images, DrawnImages):
            self.source, self.count, self.size = images, len(images), (images.side, images.side)
            return
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
                raise ValueError(f"{name}: expected uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}")
            self.source = _Pixels(images)
            self.count, self.size = len(images), (images.shape[2], images.shape[3])
            return
        if not isinstance(images, str | Path):
            self._files, self.source = images, _Decoded(images)
        elif not Path(images).is_dir():
            raise InputError(self.argument, "is not a folder of images")
        elif plain:
            self._files, self.source = ImageFiles(Path(images), _plain_files(images)), os.path.abspath(images)
        else:
            self._files = _pictures(Path(images))
            self.source = _Decoded(self._files)
            paths = {os.path.realpath(os.path.join(images, name)) for name in self._files.names}
            if left_out := paths.difference(_plain_files(images)):
                self.read_otherwise["left out"] = len(left_out)
        self.count = len(self._files)
        if not self.count:
            kind = "PNG or JPEG images (folders below it do not count)" if plain else "images"
            raise InputError(self.argument, f"holds no {kind}")
        self.size = self._common_size(stored=plain)

    def damaged_file(self) -> BadImage | None:
        """The first file that cannot be decoded; None if there is none."""
        if self._files is not None:
            for picture in range(self.count):
                try:
                    decode(self._files.read(picture))
                except (OSError, DataError) as error:
                    return BadImage(self._files.where(picture), one_line(error))
        return None

    def _common_size(self, *, stored: bool) -> tuple[int, int]:
        common = self._size(0, stored)
        for picture in range(1, self.count):
            if (size := self._size(picture, stored)) != common:
                raise InputError(
                    self.argument,
                    f"holds images of different sizes: {self._shown(0)} is {shown_size(common)}, "
                    f"{self._shown(picture)} is {shown_size(size)}",
                )
        return common

    def _size(self, picture: int, stored: bool) -> tuple[int, int]:
        """(height, width) of one picture: `stored`, or as it is read."""
        assert self._files is not None
        where = self._files.where(picture)
        try:
            data = self._files.read(picture)
            if stored:
                return stored_size(data)
            found = look(data)
        except (OSError, DataError) as error:
            reason = one_line(error)
            raise InputError(Path(where), f"is not a readable image ({reason}); replace or remove it") from None
        if found.has_frames:
            say_first_frame([where])
        if found.unusual is not None:
            self.read_otherwise[found.unusual] += 1
        return found.size

    def _shown(self, picture: int) -> str:
        assert self._files is not None
        return self._files.where(picture).removeprefix(printable(self.name) + "/")


class _Pixels(Dataset[Tensor]):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class _Decoded(Dataset[Tensor]):
    """Pictures that are decoded when they are asked for, uint8 [3, H, W]; raises `OSError` and `DataError`."""

    def __init__(self, files: EncodedImages):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = np.array(decode(self.files.read(index)))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def shown_size(size: tuple[int, int]) -> str:
    """(H, W) as "H×W"."""
    return f"{size[0]}×{size[1]}"


def _pictures(folder: Path) -> ImageFiles:
    names, others, unread = list_pictures(folder)
    if unread:
        raise InputError(Path(unread[0].path), f"{unread[0].reason}; make it readable")
    if names:
        say_what_is_left_out(folder, others)
    return ImageFiles(folder, names)


def _plain_files(folder: str | Path) -> list[str]:
    """The paths that torch-fidelity reads, in its order."""
    return fidelity().utils.glob_samples_paths(str(folder), False, _PLAIN_SUFFIXES, None, False)
