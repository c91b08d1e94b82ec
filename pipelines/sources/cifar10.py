"""CIFAR10 from the files of its authors, checked against torchvision's checksums."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from pipelines.dataset import ArrayDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import cached, printable
from pipelines.errors import DataError, one_line
from pipelines.sources.arrays import from_pictures
from pipelines.sources.downloads import fetching, quiet_network
from pipelines.sources.paths import archive_root, check_files, is_file

log = logging.getLogger("gfmn")


def open_cifar10(
    name: str, path: Path | None, preprocessing: Preprocessing, *, skip_bad_images: bool = False
) -> ArrayDataset:
    """The 50,000 training images of CIFAR10 (python version), 32×32, with labels 0..9.

    Args:
        name: name of the dataset.
        path: the folder that holds (or is) `cifar-10-batches-py`, or the archive; downloaded into it when absent.
            None is a folder in the cache.
        preprocessing: other sizes than 32 are resized with PIL.
        skip_bad_images: changes nothing: the checksums say whether every picture is good.

    Raises:
        DataError: a checksum is wrong (the files are pickles: nothing is loaded that is not exactly the authors'
            file), or the download fails.
    """
    from torchvision.datasets import CIFAR10

    root = cached("cifar10") if path is None else archive_root(path, CIFAR10.base_folder)
    checksums = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]

    def is_absent() -> bool:
        return any(not is_file(root / CIFAR10.base_folder / file) for file, _ in checksums)

    with fetching(root, is_absent):
        check_files(root / CIFAR10.base_folder, checksums)
        absent, archive = is_absent(), root / CIFAR10.filename
        if absent and is_file(archive):
            check_files(root, [(CIFAR10.filename, CIFAR10.tgz_md5)])
        elif absent:
            log.info("downloading CIFAR10 to %s", printable(root))
        try:
            with quiet_network():
                data = CIFAR10(str(root), train=True, download=absent)
        except Exception as error:  # torchvision and its download raise what the network, the disk and the files do
            raise DataError(
                f"{printable(root)}: CIFAR10 is not there and cannot be downloaded ({one_line(error)}); "
                f"put {CIFAR10.filename} there"
            ) from None
    labels = np.asarray(data.targets, dtype=np.int64)
    return from_pictures(name, preprocessing, data.data, where=printable(root), labels=labels, num_classes=10)
