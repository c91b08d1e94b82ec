"""FashionMNIST from the files of its authors, whose archives are checked against torchvision's checksums."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.dataset import ArrayDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import cached, printable
from pipelines.errors import DataError, one_line
from pipelines.sources.arrays import from_pictures
from pipelines.sources.downloads import fetching, quiet_network
from pipelines.sources.paths import check_files, is_file

log = logging.getLogger("gfmn")

_FOLDER = "FashionMNIST"
_SIDE, _MARGIN = 28, 2
_DAMAGED = "FashionMNIST is damaged"
_REMEDY = (
    "delete its files *-ubyte: they are unpacked again from *-ubyte.gz, which are downloaded where they are missing"
)


def open_fashion(
    name: str, path: Path | None, preprocessing: Preprocessing, *, skip_bad_images: bool = False
) -> ArrayDataset:
    """The 60,000 training images of FashionMNIST (Xiao et al. 2017), 28×28 and grey, with labels 0..9.

    Each is centred on black in 32×32, in three equal channels: nothing is resampled at the usual size.

    Args:
        name: name of the dataset.
        path: the folder that holds `FashionMNIST/raw`, or is `FashionMNIST` or `raw`, with the four files `*-ubyte` or
            their archives `*-ubyte.gz`; downloaded into it when absent. None is a folder in the cache.
        preprocessing: other sizes than 32 are resized with PIL.
        skip_bad_images: changes nothing: the archives' checksums say whether every picture is good.

    Raises:
        DataError: an archive's checksum is wrong, a file is damaged, or the download fails.
    """
    from torchvision.datasets import FashionMNIST

    root = cached("fashion") if path is None else _root(path)
    raw = root / _FOLDER / "raw"

    def is_absent() -> bool:
        return any(not is_file(raw / Path(file).stem) for file, _ in FashionMNIST.resources)

    with fetching(root, is_absent):
        check_files(raw, FashionMNIST.resources)
        absent = is_absent()
        if absent and any(not is_file(raw / file) for file, _ in FashionMNIST.resources):
            log.info("downloading FashionMNIST to %s", printable(root))
        try:
            with quiet_network():
                data = FashionMNIST(str(root), train=True, download=absent)
            pictures, labels = data.data.numpy(), data.targets.numpy()
            whole = pictures.shape[1:] == (_SIDE, _SIDE) and len(pictures) == len(labels) > 0
        except Exception as error:  # torchvision and its download raise what the network, the disk and the files do
            if not absent:
                raise DataError(f"{printable(raw)}: {_DAMAGED} ({one_line(error)}); {_REMEDY}") from None
            raise DataError(
                f"{printable(root)}: FashionMNIST is not there and cannot be downloaded ({one_line(error)}); put the "
                f"four files *-ubyte.gz into {_FOLDER}/raw there"
            ) from None
    if not whole:
        raise DataError(f"{printable(raw)}: {_DAMAGED}; {_REMEDY}")
    padded = np.pad(pictures, ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))
    images = np.repeat(padded[..., None], 3, axis=3)
    return from_pictures(
        name, preprocessing, images, where=printable(root), labels=labels.astype(np.int64), num_classes=10
    )


def fit_garment(picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """An RGB picture as `open_fashion` shows its own: resized to 28×28, with a black margin, and then as all are."""
    padded = Image.new("RGB", (_SIDE + 2 * _MARGIN, _SIDE + 2 * _MARGIN))
    padded.paste(Preprocessing(image_size=_SIDE).fit(picture), (_MARGIN, _MARGIN))
    return preprocessing.fit(padded)


def _root(path: Path) -> Path:
    """The folder that torchvision calls root, whether `path` is it or one of the two in it."""
    if path.name == "raw" and path.parent.name == _FOLDER:
        return path.parent.parent
    return path.parent if path.name == _FOLDER else path
