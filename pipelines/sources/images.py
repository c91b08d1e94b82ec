"""Pictures of the user's own: a folder of image files, or one array file."""

from __future__ import annotations

from pathlib import Path

from pipelines.dataset import ImageDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import printable
from pipelines.errors import DataError
from pipelines.sources.arrays import ARRAY_SUFFIXES, open_array_file
from pipelines.sources.folder import open_folder
from pipelines.sources.paths import existing_path


def open_images(
    name: str, path: Path | None, preprocessing: Preprocessing, *, skip_bad_images: bool = False
) -> ImageDataset:
    """The array file or the folder at `path`.

    Raises:
        DataError: as `open_array_file` and `open_folder`, or the file is of another kind.
    """
    path = existing_path(name, path)
    if path.is_file():
        if path.suffix.lower() not in ARRAY_SUFFIXES:
            raise DataError(f"{printable(path)}: not a folder of images and not a .npy or .npz file")
        return open_array_file(name, path, preprocessing)
    return open_folder(name, path, preprocessing, skip_bad_images=skip_bad_images)
