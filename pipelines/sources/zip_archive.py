"""Zip archives of image files, read in place."""

from __future__ import annotations

import hashlib
import posixpath
import struct
import zipfile
from pathlib import Path

from pipelines.dataset import EncodedDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import MAX_FILE, digest_entries, printable
from pipelines.errors import DataError, one_line
from pipelines.sources.labels import find_classes, say_classes
from pipelines.sources.listing import describe_files, say_what_is_left_out, sort_names
from pipelines.sources.paths import unusable

ZIP_SUFFIX = ".zip"
_ENCRYPTED = 1


class ZipImages:
    """Image files in one archive; `names` are theirs in it, sorted, with "/" between folders.

    Every read opens the archive for itself, so threads and forked processes share nothing.
    """

    def __init__(self, path: Path, entries: dict[str, zipfile.ZipInfo], names: list[str]) -> None:
        self.path = path
        self.names = names
        self._entries = [entries[name] for name in names]

    def __len__(self) -> int:
        return len(self.names)

    def where(self, picture: int) -> str:
        """The archive and the entry."""
        return f"{printable(self.path)}/{printable(self.names[picture])}"

    def read(self, picture: int) -> bytes:
        """The entry's content; raises `OSError`."""
        return read_entry(self.path, self._entries[picture])

    def digest(self, *, skip_unreadable: bool) -> str:
        """SHA-256 over names, sizes and contents: that of a folder with the same files."""
        return digest_entries(self.path, self.names, self._digest_one, self.where, skip_unreadable=skip_unreadable)

    def _digest_one(self, picture: int) -> str | OSError:
        try:
            content = self.read(picture)
        except OSError as error:
            return error
        return f"{len(content)} {hashlib.sha256(content).hexdigest()}"


def open_zip(
    name: str, path: Path, preprocessing: Preprocessing, *, labelled: bool = True, skip_bad_images: bool = False
) -> EncodedDataset:
    """All images of a zip archive, sorted by their names in it.

    Args:
        name: name of the dataset.
        path: the archive.
        preprocessing: crop and size of the images.
        labelled: whether to look for classes, as `find_classes` does.
        skip_bad_images: leave out entries that cannot be used instead of stopping.

    Raises:
        DataError: a damaged, encrypted or unreadable archive, no images in it, or splits in place of classes.
    """
    where = printable(path)
    entries = _entries(path)
    names, others = sort_names(entries)
    if not names:
        found = f", only {describe_files(others)}" if others else ""
        raise DataError(f"{where}: no images in this archive{found}; unpack it, and give what is in it")
    if any(entries[entry].flag_bits & _ENCRYPTED for entry in names):
        raise DataError(f"{where}: the archive is encrypted; unpack it, and give the folder")
    classes = None
    if labelled:
        classes = find_classes(
            where,
            names,
            others,
            lambda file: read_entry(path, entries[file]),
            advice=lambda split: f"unpack it, and give the folder that is meant, such as {printable(split)}",
        )
        say_classes(where, len(names), classes)
    say_what_is_left_out(path, others)
    return EncodedDataset(
        name,
        preprocessing,
        ZipImages(path, entries, names),
        labels=None if classes is None else classes.labels,
        num_classes=None if classes is None else classes.number,
        skip_bad_images=skip_bad_images,
    )


def read_entry(path: Path, entry: zipfile.ZipInfo) -> bytes:
    """The content of one entry, at most 1 GiB; raises `OSError`, also if it is damaged."""
    if entry.file_size > MAX_FILE:
        raise OSError(f"{entry.file_size / 2**30:.1f} GiB is too large for a picture")
    with open(path, "rb") as archive:
        try:
            archive.seek(entry.header_offset)
            signature, name_length, extra_length = struct.unpack("<4s22xHH", archive.read(30))
            if signature != b"PK\x03\x04":
                raise OSError("the archive changed, or is damaged here")
            archive.seek(name_length + extra_length, 1)
            content = zipfile.ZipExtFile(archive, "r", entry).read(entry.file_size + 1)
        except OSError:
            raise
        except Exception as error:  # what zipfile and its decompressors make of a damaged entry
            raise OSError(f"cannot be unpacked ({one_line(error)})") from None
    if len(content) != entry.file_size:
        raise OSError("cut short in the archive")
    return content


def _entries(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Every file of the archive by its name with "/" between folders; of two with one name, the last."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {_plain(entry.filename): entry for entry in archive.infolist() if not entry.is_dir()}
    except OSError as error:
        raise unusable(path, error) from None
    except Exception as error:  # zipfile raises what a damaged directory makes it stumble over
        raise DataError(f"{printable(path)}: damaged archive ({one_line(error)}); copy it again") from None


def _plain(name: str) -> str:
    """The name of an entry as other archives would have it: without "./", "//" or backslashes."""
    return posixpath.normpath(name.replace("\\", "/")).lstrip("/")
