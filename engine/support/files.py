"""Files that are written whole or not at all, locks, and how much memory this machine has."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.support.errors import InputError

log = logging.getLogger("gfmn")

_REASONS: dict[int | None, str] = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "larger than a file may be here (ulimit -f)",
}


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a kill at any moment, sees the old file or the new one.

    Raises InputError with one line if the disk is full, a quota or limit is reached, or the folder cannot be written
    to; the old file stays.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InputError(path, f"could not be written, {_reason(error)}; what was there before is untouched") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    _sync_folder(path.parent)


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata` as one safetensors file, atomically. The same content gives the same bytes."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, _with_sorted_metadata(safetensors.torch.save(dense, dict(metadata))))


def read_safetensors(
    path: Path, kind: str, description: str, advice: str = "make it again"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose metadata say `format: kind`; InputError that names the file otherwise."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise InputError(path, f"is not {description}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(path, "does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(path, f"is truncated or damaged ({error})" + (f"; {advice}" if advice else "")) from None


def _with_sorted_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes them in another order every time.

    The format is an 8-byte little-endian length, a JSON header of that length padded with spaces, and the data.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def total_memory() -> int:
    """Bytes of RAM in this machine, used and free."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno, error.strerror or str(error))


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
def locked(path: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Only one process at a time is inside: it holds a lock on the file `path`, which is made and removed here.

    Whatever ends the process frees the lock. If another process is inside, `busy` is called: it raises to give up, or
    returns to wait. A file system without locks lets everybody in, after one warning.

    Raises InputError on the folder if the file cannot be made there.
    """
    descriptor = _lock(path, busy)
    _held.add(descriptor)
    try:
        yield
    finally:
        # While it is still ours: afterwards it may be the next one's.
        with contextlib.suppress(OSError):
            path.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(path: Path, busy: Callable[[], None]) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(path.parent, f"cannot be written to, {_reason(error)}") from None
        try:
            if not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                busy()
                _flock(descriptor, fcntl.LOCK_EX)
            # The one before us may have removed the file that we waited for.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, how: int) -> bool:
    """Whether the lock is ours; it counts as ours where there are no locks."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:
        _warn_of_no_locks()
    return True


@functools.cache
def _warn_of_no_locks() -> None:
    log.warning("warning: this file system has no locks: let no two processes write the same output")
