"""LSUN: encoded pictures in an LMDB database, read through the optional `lmdb` package."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipelines.dataset import EncodedDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import digest_files, printable
from pipelines.errors import DataError, one_line
from pipelines.sources.paths import check_readable, existing_path, is_file, is_folder, unusable

DATABASE = "data.mdb"
_ARCHIVES = (".zip", ".tar", ".gz", ".7z")
_OPENING = threading.Lock()


def open_lsun(
    name: str, path: Path | None, preprocessing: Preprocessing, *, skip_bad_images: bool = False
) -> EncodedDataset:
    """All pictures of an LSUN database in the order of their keys.

    Args:
        name: name of the dataset.
        path: the folder with `data.mdb` (such as `bedroom_train_lmdb`), or a folder that holds exactly one such folder.
        preprocessing: crop and size of the images.
        skip_bad_images: leave out pictures that cannot be decoded instead of stopping.

    Raises:
        DataError: no database, a damaged or empty one, or no `lmdb` package.
    """
    files = LmdbImages(_find(existing_path(name, path)))
    return EncodedDataset(name, preprocessing, files, skip_bad_images=skip_bad_images)


class LmdbImages:
    """The values of one LMDB database, sorted by key. The database must not change while it is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = _Environment.shared(folder)
        try:
            with self._environment.open().begin() as transaction:
                keys = list(transaction.cursor().iternext(keys=True, values=False))
        except DataError:
            raise
        except Exception as error:  # lmdb's own errors; the package may be missing at import
            raise DataError(f"{printable(folder)}: damaged database ({one_line(error)}); copy it again") from None
        if not keys:
            raise DataError(f"{printable(folder)}: the database is empty")
        self._ends = np.cumsum([len(key) for key in keys])
        self._keys = b"".join(keys)  # one object instead of millions

    def __len__(self) -> int:
        return len(self._ends)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_environment"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._environment = _Environment.shared(self.folder)

    def _key(self, picture: int) -> bytes:
        return self._keys[int(self._ends[picture - 1]) if picture else 0 : int(self._ends[picture])]

    def where(self, picture: int) -> str:
        """The database and the key."""
        return f"{printable(self.folder)}[{self._key(picture).decode('ascii', 'replace')}]"

    def read(self, picture: int) -> bytes:
        """The value under the key; raises `OSError`."""
        try:
            with self._environment.open().begin() as transaction:
                value = transaction.get(self._key(picture))
        except DataError as error:
            raise OSError(str(error)) from None
        except Exception as error:  # lmdb's own errors
            raise OSError(one_line(error)) from None
        if value is None:
            raise OSError("the key is no longer in the database")
        return bytes(value)

    def digest(self, *, skip_unreadable: bool) -> str:
        """SHA-256 over the database file."""
        return digest_files(self.folder, [DATABASE], skip_unreadable=skip_unreadable)


class _Environment:
    """An LMDB environment that is opened when it is first read, and again in a forked process.

    LMDB refuses to open a database twice in one process, a forked one included, so all readers of a folder share it,
    and the child closes its copy before it opens its own.
    """

    _all: ClassVar[weakref.WeakValueDictionary[str, _Environment]] = weakref.WeakValueDictionary()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment: Any = None
        self._process = 0

    @classmethod
    def shared(cls, folder: Path) -> _Environment:
        key = os.path.realpath(folder)
        environment = cls._all.get(key)
        if environment is None:
            environment = cls._all[key] = cls(folder)
        return environment

    def open(self) -> Any:
        """The environment of this process."""
        with _OPENING:
            if self._process != os.getpid():
                lmdb = _lmdb()
                if self._environment is not None:
                    self._environment.close()
                self._environment = lmdb.open(
                    os.fsencode(self.folder), readonly=True, lock=False, readahead=False, meminit=False, create=False
                )
                self._process = os.getpid()
                self._refuse_short_file()
            return self._environment

    def _refuse_short_file(self) -> None:
        """Reading a page behind the end of a file that was cut would kill the process (SIGBUS)."""
        needed = (self._environment.info()["last_pgno"] + 1) * self._environment.stat()["psize"]
        size = (self.folder / DATABASE).stat().st_size
        if size < needed:
            self._environment.close()
            self._environment, self._process = None, 0
            raise DataError(
                f"{printable(self.folder / 'data.mdb')}: cut short ({size:,} of {needed:,} bytes); copy it again"
            )


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError:
        raise DataError("dataset 'lsun' needs lmdb, which is not installed: pip install 'gfmn-engine[lsun]'") from None
    return lmdb


def _find(path: Path) -> Path:
    """The folder that holds `data.mdb`, which can be read."""
    folder = path.parent if path.name == DATABASE and is_file(path) else _database_folder(path)
    check_readable(folder / DATABASE)
    return folder


def _database_folder(path: Path) -> Path:
    if not is_folder(path):
        what = "an archive" if path.suffix.lower() in _ARCHIVES else "not an LMDB folder"
        raise DataError(f"{printable(path)}: {what}; unpack LSUN's archive, and give the folder with {DATABASE}")
    if is_file(path / DATABASE):
        return path
    try:
        below = sorted(os.listdir(path))
    except OSError as error:
        raise unusable(path, error) from None
    inside = [path / name for name in below if is_file(path / name / DATABASE)]
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(printable(folder.name) for folder in inside)
        raise DataError(f"{printable(path)}: holds several LMDB folders ({names}); choose one of them")
    packed = next((name for name in below if name.lower().endswith(_ARCHIVES)), None)
    remedy = f"unpack {printable(packed)}" if packed else "unpack the database again"
    raise DataError(f"{printable(path)}: an LMDB folder without {DATABASE}; {remedy}")
