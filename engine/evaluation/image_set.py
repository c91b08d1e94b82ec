"""Sets of images of one size, in memory or as files of a folder, as torch-fidelity reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from engine.evaluation.fidelity import fidelity
from engine.support.errors import InputError
from pipelines.errors import one_line

_SUFFIXES = "png,jpg,jpeg"


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
    """Images of one size: a tensor uint8 [N, 3, H, W], images to be drawn, or the PNG and JPEG files of a folder.

    Args:
        images: the tensor, the drawn images, or the folder's path. Folders below it do not count.
        name: of what is no folder: the argument that errors name, or the file that it comes from.

    Attributes:
        source: what torch-fidelity is given, a dataset or the folder's path.
        argument: what errors name.
        name: the same as text.
        count: N.
        size: (H, W).

    Raises InputError that names the folder or file if there are no images, one cannot be read, or sizes differ, and
    ValueError for a tensor that is not uint8 [N, 3, H, W].
    """

    def __init__(self, images: Tensor | DrawnImages | str | Path, name: str | Path = "images"):
        self.source: Dataset[Tensor] | str
        self.argument = Path(images) if isinstance(images, str | Path) else name
        self.name = str(self.argument)
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
        self.source = str(folder)
        files = self.files()
        if not files:
            raise InputError(folder, "holds no PNG or JPEG images (folders below it do not count)")
        self.count, self.size = len(files), _size(files[0])
        for file in files:
            if (size := _size(file)) != self.size:
                raise InputError(
                    folder,
                    f"holds images of different sizes: {Path(files[0]).name} is {shown_size(self.size)}, "
                    f"{Path(file).name} is {shown_size(size)}",
                )

    def files(self) -> list[str]:
        """The files that torch-fidelity reads, in its order; none of a tensor."""
        if not isinstance(self.source, str):
            return []
        return fidelity().utils.glob_samples_paths(self.source, False, _SUFFIXES, None, False)

    def damaged_file(self) -> str | None:
        """The first file that cannot be decoded; None if there is none."""
        return next((file for file in self.files() if not _decodes(file)), None)


class _Pixels(Dataset[Tensor]):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def shown_size(size: tuple[int, int]) -> str:
    """(H, W) as "H×W"."""
    return f"{size[0]}×{size[1]}"


def _size(file: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except OSError as error:
        raise InputError(Path(file), f"is not a readable image ({one_line(error)}); replace or remove it") from None


def _decodes(file: str) -> bool:
    try:
        with Image.open(file) as image:
            image.load()
    except OSError:
        return False
    return True
