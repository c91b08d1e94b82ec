"""Files that are written whole or not at all, and how much memory this machine has."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.support.errors import InputError

_REASONS: dict[int | None, str] = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "larger than a file may be here (ulimit -f)",
}


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
        reason = {None: absent, "folder": "is a folder; name a file in it", "other": "is not a plain file"}[found]
        raise InputError(Path(path), reason)
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
    return InputError(Path(path), f"cannot be read: {_REASONS.get(error.errno, error.strerror or str(error))}")


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
        reason = _REASONS.get(error.errno, error.strerror or str(error))
        raise InputError(path, f"could not be written, {reason}; what was there before is untouched") from error
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
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise InputError(path, f"is not {description}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(path, f"is truncated or damaged ({error}); {advice}") from None


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
