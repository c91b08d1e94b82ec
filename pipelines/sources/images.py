"""Pictures of the user's own: a folder, an archive, a table, one array file, or one picture."""

from __future__ import annotations

from pathlib import Path

from pipelines.dataset import EncodedDataset, ImageDataset
from pipelines.decoding.formats import suffixes
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import printable
from pipelines.errors import DataError
from pipelines.sources.arrays import ARRAY_SUFFIXES, open_array_file
from pipelines.sources.folder import ImageFiles, open_folder
from pipelines.sources.listing import list_pictures
from pipelines.sources.parquet import PARQUET_SUFFIX, open_parquet
from pipelines.sources.paths import check_readable, existing_path, is_file, is_folder
from pipelines.sources.zip_archive import ZIP_SUFFIX, open_zip


def open_images(
    name: str, path: Path | None, preprocessing: Preprocessing, *, skip_bad_images: bool = False
) -> ImageDataset:
    """The pictures at `path`: a folder tree of image files, or of Parquet files with a column of pictures; a zip
    archive; a `.parquet`, `.npy` or `.npz` file; one image file.

    Raises:
        DataError: as the opener of each kind, or the file is of another kind.
    """
    path = existing_path(name, path)
    if is_folder(path):
        listing = list_pictures(path)
        tables = [file for file in listing.others if file.lower().endswith(PARQUET_SUFFIX)]
        if tables and not listing.pictures and not listing.unread:
            return open_parquet(name, path, tables, preprocessing, skip_bad_images=skip_bad_images)
        return open_folder(name, path, preprocessing, skip_bad_images=skip_bad_images, listing=listing)
    if not is_file(path):
        raise DataError(f"{printable(path)}: not a folder and not a regular file; give one of these")
    check_readable(path)
    suffix = path.suffix.lower()
    if suffix in ARRAY_SUFFIXES:
        return open_array_file(name, path, preprocessing)
    if suffix == ZIP_SUFFIX:
        return open_zip(name, path, preprocessing, skip_bad_images=skip_bad_images)
    if suffix == PARQUET_SUFFIX:
        return open_parquet(name, path.parent, [path.name], preprocessing, skip_bad_images=skip_bad_images)
    if suffix in suffixes():
        return EncodedDataset(
            name, preprocessing, ImageFiles(path.parent, [path.name]), skip_bad_images=skip_bad_images
        )
    raise DataError(
        f"{printable(path)}: not a folder of images, and not a .zip, .parquet, .npy, .npz or image file; "
        f"if it is an archive, unpack it and give the folder"
    )
