"""Files that are written whole or not at all, locks, and how much memory this machine has."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import glob
import json
import logging
import os
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.support.errors import InputError, WriteError, reason

log = logging.getLogger("gfmn")

_CHECKSUM = "crc32"
_POLL = 0.2
_RANDOM = 8  # characters that `tempfile` puts into a name
_LOCKED_BY_THEN = 10.0  # seconds: a younger draft may not be locked yet


def what_is(path: str | Path) -> str | None:
    """ "file", "folder" or "other" (a pipe, a device); None if nothing is there.

    Raises InputError that names the path if that cannot be known: a folder above it may not be entered, say.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def expanded(path: str | Path) -> Path:
    """`path` with the home folder for a leading ~, where that is known."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def check_file(path: str | Path, absent: str = "does not exist") -> None:
    """InputError that names the path, or says `absent` of it, unless it is a plain file that may be read."""
    found = what_is(path)
    if found != "file":
        problem = {None: absent, "folder": "is a folder; name a file in it", "other": "is not a plain file"}[found]
        raise InputError(Path(path), problem)
    try:
        open(path, "rb").close()
    except OSError as error:
        raise _unreadable(path, error) from None


def read_file(path: str | Path, absent: str = "does not exist") -> bytes:
    """What a file or a pipe holds; InputError that names the path if it cannot be read."""
    if what_is(path) != "other":
        check_file(path, absent)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str | Path, error: OSError) -> InputError:
    return InputError(Path(path), f"cannot be read: {reason(error)}")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write in pieces: at the end of the block it is at `path`, whole; after an error nothing has changed.

    A reader, or a kill at any moment, sees the old file or the new one; the draft that a kill leaves beside it is
    removed by the next write. A symbolic link stays, and its target is replaced. What is no plain file (a device, a
    pipe, this process's own output) is written through.

    Raises WriteError with one line if the disk is full, a quota or limit is reached, `path` is a folder, or its folder
    cannot be written to; the old file stays.
    """
    path, temporary, old = Path(path), None, ""
    try:
        stream = _stream(path)
        if stream is not None:
            with os.fdopen(stream, "wb") as file:
                yield file
            return
        old = "; what was there before is untouched"
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        _drop_dead_drafts(target)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # of a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)  # while it is locked
            temporary = None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WriteError(path, f"could not be written, {reason(error)}{old}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    _sync_folder(target.parent)


def _drop_dead_drafts(target: Path) -> None:
    """Remove drafts of `target` whose writers were killed: nobody holds their locks."""
    for draft in leftovers(target.parent, glob.escape(target.name)):
        with contextlib.suppress(OSError):
            if time.time() - draft.stat().st_mtime < _LOCKED_BY_THEN:
                continue
            with open(draft, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                draft.unlink()


def leftovers(folder: Path, *names: str) -> Iterator[Path]:
    """What killed writes of files of these names, or patterns of names, left in `folder`: the drafts of `atomic_file`.

    A write that still goes on has such a draft, too: ask for names that nobody else is writing there.
    """
    for name in names:
        yield from folder.glob(f".{name}.{'?' * _RANDOM}.tmp")


def _stream(path: Path) -> int | None:
    """A descriptor of what is at `path` if that is to be written through; None for a plain file, or none yet."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    for own, file in ((1, sys.stdout), (2, sys.stderr)):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(status, os.fstat(own)):
                file.flush()
                return os.dup(own)
    return None if stat.S_ISREG(status.st_mode) else os.open(path, os.O_WRONLY)


def check_output(path: str | Path, argument: str, *, example: str = "", plain: bool = False) -> None:
    """InputError on `argument` if no file could be written to `path`: before the work instead of after it.

    Args:
        path: of the file to come. Nothing is written or made here.
        argument: that it was given by.
        example: the name of a file in a folder, for who gave the folder.
        plain: refuse also what is no plain file, because more files will stand beside it.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise InputError(argument, f"{path} is a folder; name a file" + (example and f", such as {path}/{example}"))
        stream = target.exists() and not target.is_file()
        if stream and plain:
            raise InputError(argument, f"{path} is a device or a pipe; name a file")
        folder = target if stream else target.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not stream and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(folder, os.W_OK | (0 if stream else os.X_OK)):
            raise InputError(argument, f"{path}: {folder} cannot be written to")
    except OSError as error:
        raise InputError(argument, f"{path} cannot be written, {reason(error)}") from None


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; WriteError that names the file if that fails, when a part of it may be there."""
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise WriteError(path, f"could not be written, {reason(error)}") from error


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata` as one safetensors file, atomically. The same content gives the same bytes.

    The metadata get a checksum of all, which the format lacks: a changed byte would only be another number.
    """
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checked = {**metadata, _CHECKSUM: _checksum(dense, metadata)}
    data = memoryview(safetensors.torch.save(dense, checked))
    end, header = _sorted_header(data)
    with atomic_file(path) as file:
        file.write(header)
        file.write(data[end:])  # in place: a copy of the tensors is enough


def read_safetensors(
    path: Path, kind: str, description: str, advice: str = "make it again"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose metadata say `format: kind`; InputError that names the file otherwise."""
    check_file(path)
    try:
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != kind:
            raise InputError(path, f"is not {description}")
        return tensors, metadata
    except (SafetensorError, OSError) as error:
        raise InputError(path, f"is truncated or damaged ({error})" + (f"; {advice}" if advice else "")) from None


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file; SafetensorError if it is damaged, OSError if it cannot be read."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _CHECKSUM in metadata:
        found = metadata.pop(_CHECKSUM)
        if found != _checksum(tensors, metadata):
            raise SafetensorError("its checksum is that of another content")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 over the metadata, and the tensors with their names, types and shapes."""
    value = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """safetensors' `safe_open`, for every path: it takes paths in UTF-8 alone, and a file system allows other bytes."""
    with open(path, "rb") as file:
        name = str(path) if str(path).isprintable() else f"/dev/fd/{file.fileno()}"
        with safe_open(name, framework="pt") as tensors:
            yield tensors


def _sorted_header(data: memoryview) -> tuple[int, bytes]:
    """Where the header of a safetensors file ends, and one with its metadata in order in its place: the library writes
    them in another order every time.

    The format is an 8-byte little-endian length, a JSON header of that length padded with spaces, and the data.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:end]))
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return end, len(text).to_bytes(8, "little") + text


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # The new file is in place by now; file systems that cannot sync a folder (many network ones) are no reason to fail.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Locks of this process. A forked child would share them, and a worker that outlives its parent would hold them on.
_held: set[int] = set()


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], None], waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Only one process at a time is inside: it holds a lock on the file `path`, which is made and removed here.

    Whatever ends the process frees the lock. If another process is inside, `busy` is called: it raises to give up, or
    returns to wait. Meanwhile `waiting` is called a few times in a second, and may raise as well. A file system without
    locks lets everybody in, after one warning.

    Raises InputError on the folder if the file cannot be made there.
    """
    descriptor = _lock(path, busy, waiting)
    _held.add(descriptor)
    try:
        yield
    finally:
        # While it is still ours: afterwards it may be the next one's.
        with contextlib.suppress(OSError):
            path.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(path: Path, busy: Callable[[], None], waiting: Callable[[], None]) -> int:
    told = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(path.parent, f"cannot be written to, {reason(error)}") from None
        try:
            while not _flock(descriptor):
                if not told:
                    busy()
                told = True
                waiting()
                time.sleep(_POLL)
            # The one before us may have removed the file that we waited for.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    """Whether the lock is ours; it counts as ours where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        _warn_of_no_locks()
    return True


@functools.cache
def _warn_of_no_locks() -> None:
    log.warning("warning: this file system has no locks: let no two processes write the same output")
