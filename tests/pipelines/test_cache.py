"""The cache: one that cannot be used is done without, after one warning that says how to have one."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from pipelines import DataError, cache_folder, cache_is_kept, cached, digests, named_cache_folder


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch) -> None:
    """Every test asks anew, and has its own home and temporary folder."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("GFMN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for function in (digests._writable, digests.temporary_folder):
        function.cache_clear()
    yield
    for function in (digests._writable, digests.temporary_folder):
        function.cache_clear()


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def no_home(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))


def unknown_user(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("GFMN_CACHE", "~nobody-by-this-name/cache")


def not_a_folder(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("GFMN_CACHE", str(folder / "file" / "cache"))
    (folder / "file").write_text("")


def read_only(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(tempfile, "TemporaryFile", refuse)


def one_folder_of_somebody_else(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / ".cache" / "gfmn" / "targets").mkdir(parents=True)
    make = tempfile.TemporaryFile
    patch.setattr(tempfile, "TemporaryFile", lambda dir: refuse() if dir.name == "targets" else make(dir=dir))


def full(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def mkdir(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(Path, "mkdir", mkdir)


@pytest.mark.parametrize(
    "spoil",
    [no_home, unknown_user, not_a_folder, read_only, one_folder_of_somebody_else, full],
    ids=lambda function: function.__name__,
)
def test_one_warning_and_a_folder_that_works(spoil, tmp_path: Path, monkeypatch, caplog) -> None:
    spoil(monkeypatch, tmp_path)
    with caplog.at_level("WARNING"):
        folders = {cache_folder(), cache_folder(), cached("targets", "a").parents[1]}
    (folder,) = folders
    assert ["GFMN_CACHE" in record.getMessage() for record in caplog.records] == [True]
    assert folder.parent == tmp_path / "tmp"
    assert not cache_is_kept()
    digests._remove(str(folder), os.getpid() + 1)
    assert folder.is_dir(), "a forked worker leaves it"
    digests._remove(str(folder), os.getpid())
    assert not folder.exists()


def test_what_a_read_only_cache_holds_is_used(tmp_path: Path, monkeypatch, caplog) -> None:
    kept = tmp_path / ".cache" / "gfmn" / "targets" / "a"
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    read_only(monkeypatch, tmp_path)
    with caplog.at_level("WARNING"):
        assert cached("targets", "a") == kept
    assert not caplog.records
    assert cached("targets", "b") == tmp_path / "tmp" / cache_folder().name / "targets" / "b"


def test_a_cache_that_works(tmp_path: Path, monkeypatch, caplog) -> None:
    assert cache_folder() == named_cache_folder() == tmp_path / ".cache" / "gfmn"
    assert cache_is_kept()
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "own"))
    assert cached("digests", "a") == tmp_path / "own" / "digests" / "a"
    assert os.listdir(tmp_path / "own") == []
    assert not caplog.records


def test_no_temporary_folder_either(tmp_path: Path, monkeypatch) -> None:
    read_only(monkeypatch, tmp_path)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(DataError, match="GFMN_CACHE"):
        cache_folder()
