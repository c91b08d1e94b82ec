"""Files that are written whole or not at all: kills, full disks, and folders that cannot be written to."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import signal
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.support.errors import InputError
from engine.support.files import read_safetensors, save_safetensors, write_atomically

OLD, NEW = b"old" * 1000, b"new" * 2000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.write_bytes(OLD)
    return path


def assert_old_alone(path: Path) -> None:
    assert path.read_bytes() == OLD
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def assert_one_line(message: str, path: Path) -> None:
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def fork(work: Callable[[], None]) -> int:
    """Do `work` in a child process that ends there with 0; returns its pid. (A new interpreter costs seconds.)"""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def test_replaces(path):
    write_atomically(path, NEW)
    assert path.read_bytes() == NEW
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_makes_folders(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "a"
    write_atomically(str(path), NEW)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a", NEW)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_reader_of_the_old_file_keeps_it(path):
    with path.open("rb") as reader:
        write_atomically(path, NEW)
        assert reader.read() == OLD


def test_data_reach_the_disk_before_the_name(path, monkeypatch):
    """Power may fail after any call, so the order is: contents, name, folder."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size
        calls.append(("fsync", kind))
        fsync(descriptor)

    def watched_replace(source, destination) -> None:
        calls.append(("replace", Path(destination).name))
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_atomically(path, NEW)
    assert calls == [("fsync", len(NEW)), ("replace", "checkpoint"), ("fsync", "folder")]


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota is used up")],
    ids=["full", "quota"],
)
def test_disk_full(number, reason, path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=reason) as error:
        write_atomically(path, NEW)
    assert_one_line(str(error.value), path)
    assert_old_alone(path)


def test_write_that_fails_halfway(path, monkeypatch):
    fdopen = os.fdopen

    def fragile(descriptor: int, mode: str):
        file = fdopen(descriptor, mode, buffering=0)

        class Fragile:
            def __enter__(self):
                return self

            def __exit__(self, *error) -> None:
                file.close()

            def write(self, data: bytes) -> None:
                file.write(data[: len(data) // 2])
                raise OSError(errno.EIO, "Input/output error")

        return Fragile()

    monkeypatch.setattr(os, "fdopen", fragile)
    with pytest.raises(InputError, match="Input/output error") as error:
        write_atomically(path, NEW)
    assert_one_line(str(error.value), path)
    assert_old_alone(path)


def test_interrupted_by_the_user(path, monkeypatch):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, NEW)
    assert_old_alone(path)


def test_folders_that_cannot_be_synced_are_no_failure(path, monkeypatch):
    fsync = os.fsync

    def picky(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", picky)
    write_atomically(path, NEW)
    assert path.read_bytes() == NEW


def test_file_size_limit(path, tmp_path_factory):
    """A real refusal by the kernel in the middle of the data."""
    said = tmp_path_factory.mktemp("said") / "message"

    def limited() -> None:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            write_atomically(path, bytes(1_000_000))
        except InputError as error:
            said.write_text(str(error))

    _, status = os.waitpid(fork(limited), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_one_line(said.read_text(), path)
    assert "ulimit -f" in said.read_text()
    assert_old_alone(path)


@pytest.mark.parametrize("moment", ["write", "fsync", "chmod", "replace"])
def test_killed(moment, path):
    """kill -9 as each of the four steps begins (in the middle of the data, for the first)."""
    fdopen = os.fdopen

    def die(*arguments, **options) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class DiesHalfway:
        def __init__(self, descriptor: int, mode: str):
            self.file = fdopen(descriptor, mode)

        def __enter__(self) -> DiesHalfway:
            return self

        def __exit__(self, *error) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()

    def write() -> None:
        setattr(os, *(("fdopen", DiesHalfway) if moment == "write" else (moment, die)))
        write_atomically(path, NEW)

    _, status = os.waitpid(fork(write), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert path.read_bytes() == OLD
    # What the dead process left behind is hidden and is in nobody's way.
    (left,) = (entry.name for entry in path.parent.iterdir() if entry != path)
    assert left.startswith(".checkpoint.")
    assert left.endswith(".tmp")
    write_atomically(path, NEW)
    assert path.read_bytes() == NEW


def test_killed_at_random_moments(path):
    """A reader finds a whole file, old or new, while it is being replaced and after every kill."""
    size = 800_000
    path.write_bytes(bytes(size))

    def write_for_ever() -> None:
        for n in itertools.count(1):
            write_atomically(path, bytes([n % 256]) * size)

    seen = set()
    for delay in (0.0, 0.011, 0.023, 0.037, 0.051):
        pid = fork(write_for_ever)
        time.sleep(0.05 + delay)
        seen.add(path.read_bytes())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.add(path.read_bytes())
    assert len(seen) > 1, "nothing was written"
    for data in seen:
        assert data == data[:1] * size


def test_path_is_a_folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(InputError, match="directory") as error:
        write_atomically(folder, NEW)
    assert_one_line(str(error.value), folder)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_parent_is_a_file(path):
    with pytest.raises(InputError) as error:
        write_atomically(path / "a", NEW)
    assert_one_line(str(error.value), path / "a")
    assert_old_alone(path)


@pytest.mark.parametrize("call", [(tempfile, "mkstemp"), (os, "replace")], ids=lambda call: call[1])
def test_folder_is_read_only(call, path, monkeypatch):
    """As root nothing is, so the calls that would be refused are."""

    def refuse(*arguments, **options) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(*call, refuse)
    with pytest.raises(InputError, match="Permission denied") as error:
        write_atomically(path, NEW)
    assert_one_line(str(error.value), path)
    assert_old_alone(path)


def test_tensors_as_they_come(tmp_path):
    """Strided, channels_last and gradient-carrying tensors are saved by value."""
    tensors = {
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "channels_last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.rand(3)),
        "scalar": torch.tensor(7),
        "half": torch.rand(3).bfloat16(),
    }
    save_safetensors(tmp_path / "a", tensors, {"format": "test"})
    found = load_file(tmp_path / "a")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_changed_byte_is_found(tmp_path):
    """Wherever it is: in a value, a name, a shape or the metadata. safetensors itself takes it for another number."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}
    save_safetensors(tmp_path / "whole", tensors, {"format": "test", "step": "300"})
    whole, path = (tmp_path / "whole").read_bytes(), tmp_path / "changed"
    passed = set()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with contextlib.suppress(InputError):
            found, metadata = read_safetensors(path, "test", "a test")
            passed.add(place)
            assert metadata["step"] == "300"
            assert {name: value.tolist() for name, value in found.items()} == {"a": [[0, 1, 2], [3, 4, 5]], "b": 7}
    name = whole.index(b"crc32")  # without its name, the checksum is one more entry
    assert passed <= set(range(name, name + len("crc32")))
