"""CelebA's aligned and cropped pictures, 178×218."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipelines.dataset import EncodedDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.sources.folder import open_folder
from pipelines.sources.paths import existing_path, is_file, is_folder
from pipelines.sources.zip_archive import ZIP_SUFFIX, open_zip

FOLDER = "img_align_celeba"
CENTER_CROP = 160
"""Side of the centre square that the paper uses, in pixels; `center_crop` replaces it."""


def open_celeba(
    name: str, path: Path | None, preprocessing: Preprocessing, *, skip_bad_images: bool = False
) -> EncodedDataset:
    """All aligned pictures of CelebA, without labels, cut to their centre square.

    Args:
        name: name of the dataset.
        path: the folder `img_align_celeba`, the one that holds it, or its zip archive.
        preprocessing: without a crop of its own, the centre square of 160 pixels is taken.
        skip_bad_images: leave out files that cannot be used instead of stopping.

    Raises:
        DataError: as `open_folder` and `open_zip`.
    """
    if preprocessing.center_crop is None:
        preprocessing = dataclasses.replace(preprocessing, center_crop=CENTER_CROP)
    path = existing_path(name, path)
    if path.suffix.lower() == ZIP_SUFFIX and is_file(path):
        return open_zip(name, path, preprocessing, labelled=False, skip_bad_images=skip_bad_images)
    folder = path / FOLDER if is_folder(path / FOLDER) else path
    return open_folder(name, folder, preprocessing, labelled=False, skip_bad_images=skip_bad_images)
