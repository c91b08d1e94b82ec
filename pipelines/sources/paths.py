"""Where the files of a data set lie, and whether they are the authors' own."""

from __future__ import annotations

from pathlib import Path

from pipelines.digests import printable
from pipelines.errors import DataError, one_line


def existing_path(name: str, path: Path | None) -> Path:
    """`path`, for a data set that cannot do without one; DataError if it is None or does not exist."""
    if path is None:
        raise DataError(f"dataset {name!r} needs a path to its files", "data")
    if not path.exists():
        raise DataError(f"{printable(path)}: no such file or folder; check the path of dataset {name!r}")
    return path


def archive_root(path: Path, folder: str) -> Path:
    """The folder that torchvision calls root, whether `path` is it, the data folder in it, or an archive in it."""
    return path.parent if path.name == folder or path.is_file() else path


def check_files(folder: Path, checksums: list[tuple[str, str]]) -> None:
    """Raise `DataError` for the first file that exists and whose MD5 is not the given one."""
    from torchvision.datasets.utils import check_integrity

    for file, checksum in checksums:
        try:
            good = not (folder / file).exists() or check_integrity(str(folder / file), checksum)
        except OSError as error:
            raise DataError(f"{printable(folder / file)}: {one_line(error)}; make it readable") from None
        if not good:
            raise DataError(f"{printable(folder / file)}: its checksum is wrong; delete it and download it again")
