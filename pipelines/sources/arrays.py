"""Data sets that live in memory as one uint8 array: `.npy` and `.npz` files, and what other sources have unpacked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.dataset import ArrayDataset
from pipelines.decoding.preprocessing import RESIZE_FILTER, Preprocessing
from pipelines.digests import printable
from pipelines.errors import DataError, one_line
from pipelines.sources.labels import Classes, class_numbers, say_classes
from pipelines.sources.layouts import to_nhwc
from pipelines.sources.paths import check_memory, unusable

ARRAY_SUFFIXES = (".npy", ".npz")
"""Names of array files end like this, in upper or lower case."""


def open_array_file(name: str, path: Path, preprocessing: Preprocessing) -> ArrayDataset:
    """Images from a `.npy` file, or from a `.npz` file with `images` (or `arr_0`) and perhaps `labels` (or `arr_1`).

    The array is uint8 in a layout of `to_nhwc`; pictures of another size than `image_size` are cropped and resized
    once, here. Nothing in the file can execute code.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    pictures, labels = read_pictures(path)
    classes = None if labels is None else Classes(labels, int(labels.max()) + 1, [])
    say_classes(printable(path), len(pictures), classes)
    return from_pictures(name, preprocessing, pictures, where=printable(path), labels=labels)


def read_pictures(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The pictures of an array file in their own size, uint8 [N, H, W, 3], and their labels int64 [N] if it has any.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    try:
        images, labels = _load_npz(path) if path.suffix.lower() == ".npz" else (_load_npy(path), None)
    except DataError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise unusable(path, error) from None
        raise _unreadable(path, error) from None
    except Exception as error:  # NumPy and zipfile raise what a damaged file makes them stumble over
        raise _unreadable(path, error) from None
    pictures = to_nhwc(images, printable(path))
    return pictures, None if labels is None else class_numbers(labels, len(pictures), printable(path))


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
    check_memory(len(pictures) * size * size * 3, where)
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
    check_memory(path.stat().st_size, printable(path))
    return np.load(path, allow_pickle=False)


def _load_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    # NumPy leaves a file of its own opening open where it stumbles over its content.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        images = _pick(archive.files, ("images", "arr_0"))
        if images is None and len(archive.files) == 1:
            images = archive.files[0]
        if images is None:
            found = ", ".join(archive.files[:5]) + (", …" if len(archive.files) > 5 else "")
            raise DataError(f"{printable(path)}: holds {found or 'nothing'}; name the array of images 'images'")
        check_memory(sum(entry.file_size for entry in archive.zip.infolist()), printable(path))
        labels = _pick(archive.files, ("labels", "arr_1"))
        return archive[images], None if labels is None else archive[labels]


def _pick(names: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{printable(path)}: not a readable array file ({one_line(error)}); save it again")
