"""Where the files of a data set lie, whether they can be read, and whether they are the authors' own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipelines.digests import printable
from pipelines.errors import DataError, one_line
from pipelines.memory import memory_limit


def existing_path(name: str, path: Path | None) -> Path:
    """`path`, for a data set that cannot do without one; DataError if it is None, is not there or cannot be reached."""
    if path is None:
        raise DataError(f"dataset {name!r} needs a path to its files", "data")
    if _mode(path) is None:
        raise DataError(f"{printable(path)}: no such file or folder; check the path of dataset {name!r}")
    return path


def is_file(path: Path) -> bool:
    """Whether this is a regular file; DataError if that cannot be found out, as below a folder that is closed."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: Path) -> bool:
    """Whether this is a folder; DataError if that cannot be found out, as below a folder that is closed."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def check_readable(path: Path) -> None:
    """Raise `DataError` if the file cannot be opened."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        raise unusable(path, error) from None


def unusable(path: str | os.PathLike[str], error: Exception) -> DataError:
    """The error of a path that the system refuses."""
    if isinstance(error, PermissionError):
        return DataError(
            f"{printable(path)}: permission denied; make it readable, and open the folders above it to yourself"
        )
    return DataError(f"{printable(path)}: {one_line(error)}; check the path")


def check_memory(size: int, where: str) -> None:
    """Refuse `size` bytes that cannot fit this machine before they take the machine down."""
    total = memory_limit()
    if size > total:
        raise DataError(f"{where}: needs {size / 2**30:.1f} GiB of memory, this machine has {total / 2**30:.1f} GiB")


def archive_root(path: Path, folder: str) -> Path:
    """The folder that torchvision calls root, whether `path` is it, the data folder in it, or an archive in it."""
    return path.parent if path.name == folder or is_file(path) else path


def check_files(folder: Path, checksums: list[tuple[str, str]]) -> None:
    """Raise `DataError` for the first file that exists and whose MD5 is not the given one."""
    from torchvision.datasets.utils import check_integrity

    for file, checksum in checksums:
        try:
            good = not (folder / file).exists() or check_integrity(str(folder / file), checksum)
        except OSError as error:
            raise unusable(folder / file, error) from None
        if not good:
            raise DataError(f"{printable(folder / file)}: its checksum is wrong; delete it and download it again")


def _mode(path: Path) -> int | None:
    """The mode of what lies at a path, None if nothing does."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise unusable(path, error) from None
