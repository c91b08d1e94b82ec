"""Content digests of files, remembered for as long as nothing touched the files.

A digest is remembered under the names, sizes, inodes and both time stamps (modification and status change, in
nanoseconds) of all files, as version control systems do: rewriting a file changes its status-change time, which no
program can set back. Files that changed in the last two seconds (`FRESH_SECONDS`) are never remembered.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.device import usable_cpus
from pipelines.errors import BadImage, DataError, one_line

log = logging.getLogger("gfmn")

FRESH_SECONDS = 2.0
"""A file that changed this recently is not trusted: a clock tick may hide a second change."""
MAX_FILE = 2**30
"""Bytes of the largest file that is read as a picture."""
_BLOCK = 2**20
_CONTROL = dict.fromkeys([*range(32), *range(127, 160)], "\ufffd")


def named_cache_folder() -> Path | None:
    """`GFMN_CACHE`, or `gfmn` in the user's cache folder; None if neither is known (a container without a home)."""
    try:
        if folder := os.environ.get("GFMN_CACHE"):
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "gfmn"
    except RuntimeError:  # no home
        return None


def cache_folder() -> Path:
    """The folder for everything that is made once: digests, downloads, pretrained extractors, targets.

    `named_cache_folder()`; where that cannot be written to, a temporary folder that ends with this process, after one
    warning. Raises DataError if that cannot be made either.
    """
    return _writable(named_cache_folder())


def cached(*parts: str) -> Path:
    """Where something is kept under this name: in the named folder if it is there, which may be read-only, else in
    `cache_folder()`."""
    folder = named_cache_folder()
    if folder is not None and os.path.exists(folder.joinpath(*parts)):
        return folder.joinpath(*parts)
    return cache_folder().joinpath(*parts)


def cache_is_kept() -> bool:
    """Whether what is put into `cache_folder()` is still there when this process has ended."""
    return cache_folder() == named_cache_folder()


@functools.cache
def _writable(folder: Path | None) -> Path:
    try:
        if folder is None:
            raise OSError("this user has no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        for own in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            tempfile.TemporaryFile(dir=own).close()
    except OSError as error:
        log.warning(
            "warning: %s cannot be used (%s): what is computed is not kept for other runs; set GFMN_CACHE to a folder "
            "that can be written to",
            "the cache" if folder is None else f"the cache {printable(folder)}",
            one_line(error),
        )
        return temporary_folder()
    return folder


@functools.cache
def temporary_folder() -> Path:
    """A folder that is removed when this process ends. Raises DataError if none can be made."""
    try:
        folder = tempfile.mkdtemp(prefix="gfmn-")
    except OSError as error:
        raise DataError(f"no temporary folder can be made ({one_line(error)}); set TMPDIR, or GFMN_CACHE") from None
    atexit.register(_remove, folder, os.getpid())
    return Path(folder)


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not a forked worker's business
        shutil.rmtree(folder, ignore_errors=True)


def printable(path: str | os.PathLike[str]) -> str:
    """A path for messages: bytes that are no text, and control characters, become signs that break no terminal."""
    return os.fsencode(path).decode("utf-8", "replace").translate(_CONTROL)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file of at most 1 GiB. A pipe or a device raises `OSError` instead of blocking."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > MAX_FILE:
            raise OSError(f"{status.st_size / 2**30:.1f} GiB is too large for a picture")
        data = os.read(descriptor, status.st_size + 1)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def digest_files(root: Path, names: Sequence[str], *, skip_unreadable: bool) -> str:
    """SHA-256 over the names (relative to `root`), sizes and contents of files, in the given order, in hexadecimal.

    Raises:
        DataError: a file cannot be read, unless `skip_unreadable`: then it counts as unreadable.
    """
    paths = [os.path.join(root, name) for name in names]
    return _digest(
        lambda: _key(root, names, paths),
        names,
        lambda item: digest_file(paths[item]),
        lambda item: printable(paths[item]),
        skip_unreadable,
    )


def digest_entries(
    archive: Path,
    names: Sequence[str],
    digest_one: Callable[[int], str | OSError],
    where: Callable[[int], str],
    *,
    skip_unreadable: bool,
) -> str:
    """As `digest_files`, over entries of one archive: `digest_one` gives size and SHA-256 of an entry by its number."""
    entries = hashlib.sha256("\0".join(names).encode()).hexdigest()
    return _digest(lambda: _key(archive, [entries], [str(archive)]), names, digest_one, where, skip_unreadable)


def _digest(
    state: Callable[[], tuple[str, float]],
    names: Sequence[str],
    digest_one: Callable[[int], str | OSError],
    where: Callable[[int], str],
    skip_unreadable: bool,
) -> str:
    key, newest = state()
    remembered = cached("digests", key)
    if (digest := _recall(remembered)) is not None:
        return digest
    start = time.time()
    total = hashlib.sha256()
    complete = True
    with ThreadPoolExecutor(min(4, usable_cpus() + 1)) as pool:
        for item, content in enumerate(pool.map(digest_one, range(len(names)))):
            if isinstance(content, OSError):
                complete = False
                if not skip_unreadable:
                    raise BadImage(where(item), one_line(content)).error()
                content = "unreadable"
            total.update(os.fsencode(names[item]) + b"\0" + content.encode() + b"\0")
    if complete and newest < start - FRESH_SECONDS and state()[0] == key:
        _remember(remembered, total.hexdigest())
    return total.hexdigest()


def digest_file(path: str) -> str | OSError:
    """Size and SHA-256 of one file's content as one text, or the error that reading it gave."""
    try:
        digest, size = hashlib.sha256(), 0
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("not a regular file")
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
        return f"{size} {digest.hexdigest()}"
    except OSError as error:
        return error


def _key(root: Path, names: Sequence[str], paths: Sequence[str]) -> tuple[str, float]:
    """What identifies the state of the files, and when the newest of them changed (seconds since the epoch)."""
    key = hashlib.sha256(os.fsencode(os.path.realpath(root)))
    newest = 0
    for name, path in zip(names, paths, strict=True):
        try:
            status = os.stat(path)
        except OSError:
            key.update(os.fsencode(name) + b"\0missing\0")
            continue
        facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        key.update(os.fsencode(name) + b"\0" + repr(facts).encode() + b"\0")
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
    return key.hexdigest(), newest / 1e9


def _recall(remembered: Path) -> str | None:
    try:
        digest = remembered.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return digest if len(digest) == 64 and set(digest) <= set("0123456789abcdef") else None


def _remember(remembered: Path, digest: str) -> None:
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        draft = remembered.with_suffix(f".{os.getpid()}")
        draft.write_text(digest, encoding="ascii")
        draft.replace(remembered)
    except OSError:
        pass  # the next run computes it again
