"""Trees of image files; folders directly below the root are classes."""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path

import numpy as np

from pipelines.dataset import EncodedDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import digest_files, printable, read_file
from pipelines.errors import BadImage, DataError, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
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
    names, unread = find_images(root)
    if unread and not skip_bad_images:
        raise unread[0].error()
    if not names:
        raise DataError(f"{printable(root)}: no images below this folder (looked for {', '.join(SUFFIXES)})")
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


def find_images(root: Path) -> tuple[list[str], tuple[BadImage, ...]]:
    """Relative names of all image files below `root`, sorted, with "/" between folders, and folders that can't be read.

    Links are followed, but every real folder is entered once, so a loop of links ends; real folders go first, so a
    link to a sibling adds nothing. A broken link counts as a file, and is found out when it is read.
    """
    names: list[str] = []
    unread: list[BadImage] = []
    entered: set[tuple[int, int]] = set()
    real, linked = deque([""]), deque[str]()
    while real or linked:
        folder = real.popleft() if real else linked.popleft()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(root / folder))
        except OSError as error:
            unread.append(BadImage(printable(root / folder), one_line(error)))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                real.append(name)
            elif os.path.isdir(entry.path):  # a link; unlike entry.is_dir(), no error if it leads to itself
                linked.append(name)
            elif entry.name.lower().endswith(SUFFIXES):
                names.append(name)
    return sorted(names), tuple(sorted(unread))
