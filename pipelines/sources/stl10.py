"""STL10 from the binary files of its authors, checked against torchvision's checksums."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.dataset import ArrayDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import printable
from pipelines.errors import DataError, one_line
from pipelines.sources.arrays import from_pictures
from pipelines.sources.downloads import fetching
from pipelines.sources.paths import archive_root, check_files, existing_path, is_file


def open_stl10(
    name: str, path: Path | None, preprocessing: Preprocessing, *, skip_bad_images: bool = False
) -> ArrayDataset:
    """The 100,000 unlabelled images of STL10 (binary version), 96×96, resized once with PIL.

    Args:
        name: name of the dataset.
        path: the folder that holds (or is) `stl10_binary`, or holds its archive.
        preprocessing: with the usual 32×32, the images take 300 MB of memory.
        skip_bad_images: changes nothing: the checksum says whether every picture is good.

    Raises:
        DataError: the file is missing, or its checksum is wrong.
    """
    from torchvision.datasets import STL10
    from torchvision.datasets.utils import extract_archive

    root = archive_root(existing_path(name, path), STL10.base_folder)
    folder = root / STL10.base_folder
    file, checksum = next(entry for entry in STL10.train_list if entry[0].startswith("unlabeled"))
    with fetching(root, lambda: not is_file(folder / file)):
        if not is_file(folder / file) and is_file(root / STL10.filename):
            check_files(root, [(STL10.filename, STL10.tgz_md5)])
            try:
                extract_archive(str(root / STL10.filename), str(root))
            except OSError as error:
                raise DataError(f"{printable(root)}: cannot be unpacked into ({one_line(error)}); make room") from None
        if not is_file(folder / file):
            raise DataError(f"{printable(folder / file)}: no such file; unpack {STL10.filename} in {printable(root)}")
        check_files(folder, [(file, checksum)])
    pixels = np.memmap(folder / file, dtype=np.uint8, mode="r")
    # In the file, each channel is stored column by column.
    pictures = pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    return from_pictures(name, preprocessing, pictures, where=printable(folder / file))
