"""CIFAR10 and STL10 from the binary files of their authors, checked against torchvision's checksums."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines.dataset import ArrayDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import cache_folder, printable
from pipelines.errors import DataError, one_line
from pipelines.sources.arrays import from_pictures

DOWNLOAD_TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""
log = logging.getLogger("gfmn")


def open_cifar10(name: str, path: Path | None, preprocessing: Preprocessing) -> ArrayDataset:
    """The 50,000 training images of CIFAR10 (python version), 32×32, with labels 0..9.

    Args:
        name: name of the dataset.
        path: the folder that holds (or is) `cifar-10-batches-py`, or the archive; downloaded into it when absent.
            None is a folder in the cache.
        preprocessing: other sizes than 32 are resized with PIL.

    Raises:
        DataError: a checksum is wrong (the files are pickles: nothing is loaded that is not exactly the authors'
            file), or the download fails.
    """
    from torchvision.datasets import CIFAR10

    root = cache_folder() / "cifar10" if path is None else _root(path, CIFAR10.base_folder)
    checksums = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    _check(root / CIFAR10.base_folder, checksums)
    absent = any(not (root / CIFAR10.base_folder / file).is_file() for file, _ in checksums)
    archive = root / CIFAR10.filename
    if absent and archive.exists():
        _check(root, [(CIFAR10.filename, CIFAR10.tgz_md5)])
    elif absent:
        log.info("downloading CIFAR10 to %s", printable(root))
    try:
        with _quiet_network():
            data = CIFAR10(str(root), train=True, download=absent)
    except Exception as error:  # torchvision and its download raise what the network, the disk and the files do
        raise DataError(
            f"{printable(root)}: CIFAR10 is not there and cannot be downloaded ({one_line(error)}); "
            f"put {CIFAR10.filename} there"
        ) from None
    labels = np.asarray(data.targets, dtype=np.int64)
    return from_pictures(name, preprocessing, data.data, where=printable(root), labels=labels, num_classes=10)


def open_stl10(name: str, path: Path, preprocessing: Preprocessing) -> ArrayDataset:
    """The 100,000 unlabelled images of STL10 (binary version), 96×96, resized once with PIL.

    Args:
        name: name of the dataset.
        path: the folder that holds (or is) `stl10_binary`, or holds its archive.
        preprocessing: with the usual 32×32, the images take 300 MB of memory.

    Raises:
        DataError: the file is missing, or its checksum is wrong.
    """
    from torchvision.datasets import STL10
    from torchvision.datasets.utils import extract_archive

    root = _root(path, STL10.base_folder)
    folder = root / STL10.base_folder
    file, checksum = next(entry for entry in STL10.train_list if entry[0].startswith("unlabeled"))
    if not (folder / file).exists() and (root / STL10.filename).exists():
        _check(root, [(STL10.filename, STL10.tgz_md5)])
        extract_archive(str(root / STL10.filename), str(root))
    if not (folder / file).exists():
        raise DataError(f"{printable(folder / file)}: no such file; unpack {STL10.filename} in {printable(root)}")
    _check(folder, [(file, checksum)])
    pixels = np.memmap(folder / file, dtype=np.uint8, mode="r")
    # In the file, each channel is stored column by column.
    pictures = pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    return from_pictures(name, preprocessing, pictures, where=printable(folder / file))


def _root(path: Path, folder: str) -> Path:
    """The folder that torchvision calls root, whether `path` is it, the data folder in it, or an archive in it."""
    return path.parent if path.name == folder or path.is_file() else path


def _check(folder: Path, checksums: list[tuple[str, str]]) -> None:
    """Raise `DataError` for the first file that exists and whose MD5 is not the given one."""
    from torchvision.datasets.utils import check_integrity

    for file, checksum in checksums:
        try:
            good = not (folder / file).exists() or check_integrity(str(folder / file), checksum)
        except OSError as error:
            raise DataError(f"{printable(folder / file)}: {one_line(error)}; make it readable") from None
        if not good:
            raise DataError(f"{printable(folder / file)}: its checksum is wrong; delete it and download it again")


@contextlib.contextmanager
def _quiet_network() -> Iterator[None]:
    """Give up on a silent server, and keep what torchvision prints off the terminal."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)
