"""Trees of image files, with the classes that `labels.find_classes` finds."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.dataset import EncodedDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import digest_files, printable, read_file
from pipelines.errors import BadImage, DataError
from pipelines.sources.labels import Classes, find_classes, say_classes
from pipelines.sources.listing import Listing, describe_files, is_junk, list_pictures, say_what_is_left_out
from pipelines.sources.paths import is_folder


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
    name: str,
    root: Path,
    preprocessing: Preprocessing,
    *,
    labelled: bool = True,
    skip_bad_images: bool = False,
    listing: Listing | None = None,
) -> EncodedDataset:
    """All images below a folder, sorted by their relative path; hidden files and folders are left out.

    Classes are those of `find_classes`.

    Args:
        labelled: whether to look for classes.
        listing: what lies below the folder, where it is known.

    Raises:
        DataError: no folder, no images, a folder that cannot be read, splits in place of classes, or (unless
            `skip_bad_images`) a class folder without images.
    """
    if not is_folder(root):
        raise DataError(f"{printable(root)}: not a folder of images")
    names, others, unread = listing or list_pictures(root)
    if unread and not (skip_bad_images and names):
        way_out = "skip_bad_images" if names else None
        raise DataError(f"{unread[0]}; make it readable{', or skip bad images' if names else ''}", way_out)
    if not names:
        raise DataError(f"{printable(root)}: no images below this folder{_hint(others)}")
    classes = None
    if labelled:
        classes = find_classes(
            printable(root),
            names,
            others,
            lambda file: read_file(root / file),
            advice=lambda split: f"give the one that is meant, such as {printable(root / split)}",
        )
        say_classes(printable(root), len(names), classes)
    say_what_is_left_out(root, others)
    empty = _empty_classes(root, classes, unread)
    if empty and not skip_bad_images:
        raise empty[0].error()
    return EncodedDataset(
        name,
        preprocessing,
        ImageFiles(root, names),
        labels=None if classes is None else classes.labels,
        num_classes=None if classes is None else classes.number,
        skip_bad_images=skip_bad_images,
        bad_images=unread + empty,
    )


def _hint(others: list[str]) -> str:
    """What is there in place of images, and what to do about it."""
    if any(os.path.basename(file) == "data.mdb" for file in others):
        return "; it holds an LMDB, which the dataset 'lsun' reads"
    if not others:
        return ""
    return f", only {describe_files(others)}; convert them to JPEG or PNG, or give one archive or array file"


def _empty_classes(root: Path, classes: Classes | None, unread: tuple[BadImage, ...]) -> tuple[BadImage, ...]:
    """Folders beside the class folders that hold no images; none if the folders are no classes."""
    if classes is None or not classes.names:
        return ()
    beside = root / classes.folder
    folders = {entry for entry in os.listdir(beside) if os.path.isdir(beside / entry) and not is_junk(entry)}
    missing = sorted(folders - set(classes.names) - {os.path.basename(bad.path) for bad in unread})
    return tuple(BadImage(printable(beside / folder), "class folder without images of its own") for folder in missing)
