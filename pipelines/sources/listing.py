"""Which files below a folder, or in an archive, are pictures, which are not, and which are never data."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pipelines.decoding.formats import suffixes
from pipelines.digests import printable
from pipelines.errors import BadImage, one_line
from pipelines.sources.labels import LABEL_FILE

JUNK = frozenset(
    (
        "__macosx",
        "__pycache__",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "lost+found",
        "system volume information",
    )
)
"""Names, in lower case, of what systems leave behind. Hidden files and folders (`._x.png`, `.git`) count with them."""
_NAMED = 4
log = logging.getLogger("gfmn")


class Listing(NamedTuple):
    """What lies below a folder.

    Attributes:
        pictures: names of picture files relative to the folder, sorted, with "/" between folders.
        others: names of files that are no pictures, sorted; junk is not among them.
        unread: folders that could not be read, and why.
    """

    pictures: list[str]
    others: list[str]
    unread: tuple[BadImage, ...]


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name (without the folders above it) is never data."""
    return name.startswith(".") or name.lower() in JUNK


def sort_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names with "/" between folders → (pictures, others), sorted, without junk."""
    known = suffixes()
    pictures: list[str] = []
    others: list[str] = []
    for name in sorted(names):
        if not any(map(is_junk, name.split("/"))):
            (pictures if name.lower().endswith(known) else others).append(name)
    return pictures, others


def list_pictures(root: str | os.PathLike[str]) -> Listing:
    """All files below `root`, its subfolders included, sorted into pictures and others.

    Links are followed, but every real folder is entered once, so a loop of links ends; real folders go first, so a
    link to a sibling adds nothing. A broken link counts as a file, and is found out when it is read.
    """
    names: list[str] = []
    unread: list[BadImage] = []
    entered: set[tuple[int, int]] = set()
    real, linked = deque([""]), deque[str]()
    while real or linked:
        folder = real.popleft() if real else linked.popleft()
        where = os.path.join(root, folder)
        try:
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(where))
        except OSError as error:
            unread.append(BadImage(printable(where).rstrip("/"), one_line(error)))
            continue
        for entry in entries:
            if is_junk(entry.name):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                real.append(name)
            elif os.path.isdir(entry.path):  # a link; unlike entry.is_dir(), no error if it leads to itself
                linked.append(name)
            else:
                names.append(name)
    return Listing(*sort_names(names), tuple(sorted(unread)))


def say_what_is_left_out(where: str | os.PathLike[str], others: list[str]) -> None:
    """Log, once a place, how many files are no pictures and of which kind; files of labels are not among them."""
    if left_out := [name for name in others if PurePosixPath(name).name != LABEL_FILE]:
        _say_once(f"{printable(where)}: left out {describe_files(left_out)}; these are not pictures that can be read")


def describe_files(names: list[str]) -> str:
    """How many files of which kind, as "7 files: 5 .heic (such as a.heic), 2 .txt (such as b.txt)"."""
    kinds = Counter(PurePosixPath(name).suffix.lower() for name in names)
    shown = []
    for kind, count in kinds.most_common(_NAMED):
        example = next(name for name in names if PurePosixPath(name).suffix.lower() == kind)
        shown.append(f"{count:,} {printable(kind) or 'without a suffix'} (such as {printable(Path(example).name)})")
    rest = ", …" if len(kinds) > _NAMED else ""
    rest += "; HEIC needs pip install 'gfmn-engine[heic]'" if {".heic", ".heif"} & kinds.keys() else ""
    return f"{len(names):,} file{'s' if len(names) > 1 else ''}: {', '.join(shown)}{rest}"


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)
