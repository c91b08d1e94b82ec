"""Data sets that live in memory as one uint8 array: `.npy` and `.npz` files, and what other sources have unpacked."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.dataset import ArrayDataset
from pipelines.decoding.preprocessing import RESIZE_FILTER, Preprocessing
from pipelines.errors import DataError, one_line

ARRAY_SUFFIXES = (".npy", ".npz")
"""Names of array files end like this, in upper or lower case."""


def open_array_file(name: str, path: Path, preprocessing: Preprocessing) -> ArrayDataset:
    """Images from a `.npy` file, or from a `.npz` file with `images` (or `arr_0`) and perhaps `labels` (or `arr_1`).

    The array is uint8, [N, H, W, 3], [N, H, W, 1], [N, H, W] or [N, 3, H, W]; pictures of another size than
    `image_size` are cropped and resized once, here. Nothing in the file can execute code.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    pictures, labels = read_pictures(path)
    return from_pictures(name, preprocessing, pictures, where=str(path), labels=labels)


def read_pictures(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The pictures of an array file in their own size, uint8 [N, H, W, 3], and their labels int64 [N] if it has any.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    try:
        images, labels = _load_npz(path) if path.suffix.lower() == ".npz" else (_load_npy(path), None)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable array file ({one_line(error)}); save it again") from None
    return _as_nhwc(images, path), _as_labels(labels, images, path)


def from_pictures(
    name: str,
    preprocessing: Preprocessing,
    pictures: np.ndarray,
    *,
    where: str,
    labels: np.ndarray | None = None,
    num_classes: int | None = None,
) -> ArrayDataset:
    """Pictures uint8 [N, H, W, 3] → a dataset, cropped and resized with PIL where their size differs.

    Pictures may be a memory map: they are read one by one, in order.
    """
    height, width = pictures.shape[1:3]
    size = preprocessing.image_size
    try:
        changes = preprocessing.geometry(height, width) != ((0, 0, size, size), (size, size), (0, 0))
    except DataError as error:
        raise DataError(f"{where}: {error}; change the crop") from None
    if not changes:
        return ArrayDataset(name, preprocessing, pictures, labels=labels, num_classes=num_classes)
    _check_memory(len(pictures) * size * size * 3, where)
    images = np.empty((len(pictures), size, size, 3), dtype=np.uint8)
    for image, picture in zip(images, pictures, strict=True):
        image[:] = np.asarray(preprocessing.fit(Image.fromarray(np.ascontiguousarray(picture))))
    return ArrayDataset(
        name, preprocessing, images, labels=labels, num_classes=num_classes, resize_filter=RESIZE_FILTER
    )


def _load_npy(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it does not start like a .npy file")
    _check_memory(path.stat().st_size, str(path))
    return np.load(path, allow_pickle=False)


def _load_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with np.load(path, allow_pickle=False) as archive:
        images = _pick(archive.files, ("images", "arr_0"))
        if images is None and len(archive.files) == 1:
            images = archive.files[0]
        if images is None:
            raise DataError(f"{path}: holds {archive.files}; name the array of images 'images'")
        _check_memory(sum(entry.file_size for entry in archive.zip.infolist()), str(path))
        labels = _pick(archive.files, ("labels", "arr_1"))
        return archive[images], None if labels is None else archive[labels]


def _pick(names: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _as_nhwc(images: np.ndarray, path: Path) -> np.ndarray:
    if images.dtype != np.uint8:
        raise DataError(f"{path}: holds {images.dtype}, but images are uint8 from 0 to 255; convert them")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(
            f"{path}: has shape {list(images.shape)}, but images are [N, H, W, 3], [N, H, W] or [N, 3, H, W]"
        )
    if len(images) == 0:
        raise DataError(f"{path}: holds no images")
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


def _as_labels(labels: np.ndarray | None, images: np.ndarray, path: Path) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        shape = list(labels.shape)
        raise DataError(f"{path}: has labels {labels.dtype} {shape}; {len(images)} class numbers from 0 on are needed")
    return labels.astype(np.int64)


def _check_memory(size: int, where: str, memory: Callable[[], int] | None = None) -> None:
    """Refuse an array that cannot fit this machine before it takes the machine down."""
    total = memory() if memory else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > total:
        raise DataError(f"{where}: needs {size / 2**30:.1f} GiB of memory, this machine has {total / 2**30:.1f} GiB")
