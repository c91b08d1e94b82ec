"""Trees of image files; folders directly below the root are classes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from pipelines.dataset import EncodedDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import digest_files, printable, read_file
from pipelines.errors import BadImage, DataError
from pipelines.sources.listing import describe_files, list_pictures, say_what_is_left_out

log = logging.getLogger("gfmn")


class ImageFiles:
    """Image files below one folder; `names` are relative to it, sorted."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root = root
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def where(self, picture: int) -> str:
        """The path of the picture, as text for messages."""
        return printable(self.root / self.names[picture])

    def read(self, picture: int) -> bytes:
        """The file's bytes; raises `OSError`."""
        return read_file(os.path.join(self.root, self.names[picture]))

    def digest(self, *, skip_unreadable: bool) -> str:
        """SHA-256 over names, sizes and contents."""
        return digest_files(self.root, self.names, skip_unreadable=skip_unreadable)


def open_folder(
    name: str, root: Path, preprocessing: Preprocessing, *, labelled: bool = True, skip_bad_images: bool = False
) -> EncodedDataset:
    """All images below a folder, sorted by their relative path; hidden files and folders are left out.

    With at least two non-empty folders directly below `root`, and no image beside them, each of those folders is a
    class, numbered in sorted order.

    Raises:
        DataError: no folder, no images, a folder that cannot be read, or (unless `skip_bad_images`) a class folder
            without images.
    """
    if not root.is_dir():
        raise DataError(f"{printable(root)}: not a folder of images")
    names, others, unread = list_pictures(root)
    if unread and not skip_bad_images:
        raise unread[0].error()
    if not names:
        found = f", only {describe_files(others)}" if others else ""
        raise DataError(f"{printable(root)}: no images below this folder{found}")
    say_what_is_left_out(root, names, others)
    files = ImageFiles(root, names)
    classes = sorted({os.path.dirname(name).split("/")[0] for name in names})
    if not labelled or len(classes) < 2:
        return EncodedDataset(name, preprocessing, files, skip_bad_images=skip_bad_images, bad_images=unread)
    if "" in classes:
        log.warning("%s: holds images beside its class folders, so none of the images has a label", printable(root))
        return EncodedDataset(name, preprocessing, files, skip_bad_images=skip_bad_images, bad_images=unread)

    folders = {folder for folder in os.listdir(root) if os.path.isdir(root / folder) and not folder.startswith(".")}
    missing = sorted(folders - set(classes) - {Path(bad.path).name for bad in unread})
    empty = tuple(BadImage(printable(root / folder), "class folder without images of its own") for folder in missing)
    if empty and not skip_bad_images:
        raise empty[0].error()
    number = {folder: label for label, folder in enumerate(classes)}
    labels = np.array([number[label.split("/")[0]] for label in names], dtype=np.int64)
    return EncodedDataset(
        name,
        preprocessing,
        files,
        labels=labels,
        num_classes=len(classes),
        skip_bad_images=skip_bad_images,
        bad_images=unread + empty,
    )
