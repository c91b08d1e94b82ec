"""Output paths of every kind: links keep pointing, what is no plain file is written through, a folder is refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.support.errors import InputError, WriteError
from engine.support.files import append_line, check_output, write_atomically

OLD, NEW = b"old" * 1000, b"new" * 2000


def test_a_link_keeps_pointing(tmp_path: Path) -> None:
    target, link, far = tmp_path / "kept" / "target", tmp_path / "link", tmp_path / "far"
    target.parent.mkdir()
    target.write_bytes(OLD)
    link.symlink_to(Path("kept") / "target")
    far.symlink_to(link)
    write_atomically(far, NEW)
    assert (far.is_symlink(), link.is_symlink(), target.is_symlink()) == (True, True, False)
    assert target.read_bytes() == NEW
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_link_to_nothing_yet_gets_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "target")
    write_atomically(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "target").read_bytes() == NEW


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(WriteError):
        write_atomically(tmp_path / "a", NEW)
    assert (tmp_path / "a").is_symlink()
    with pytest.raises(InputError, match="out"):
        check_output(tmp_path / "a" / "file", "out")


@pytest.mark.parametrize("way", ["as it is", "by a link"])
def test_a_device_stays_one(way: str, tmp_path: Path) -> None:
    """Replaced, it would be an ordinary file, and everything that uses it broken; root can do that."""
    null, full = Path("/dev/null"), Path("/dev/full")
    if way == "by a link":
        (tmp_path / "null").symlink_to(null)
        (tmp_path / "full").symlink_to(full)
        null, full = tmp_path / "null", tmp_path / "full"
    write_atomically(null, NEW)
    with pytest.raises(WriteError, match="the disk is full") as error:
        write_atomically(full, NEW)
    assert str(error.value).startswith(f"{full}: ")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    for path in tmp_path.iterdir():
        assert path.is_symlink()


def test_a_pipe_is_written_through(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, NEW)
    reader.join()
    assert read == [NEW]
    assert pipe.is_fifo()


def test_own_output_is_added_to(tmp_path: Path) -> None:
    """`--json /dev/stdout > file`, and the file by its name: what was printed before stays before."""
    code = """
import sys
from engine.support.files import write_atomically
print("first")
for path in sys.argv[1:]:
    write_atomically(path, b"data\\n")
print("last")
"""
    out = tmp_path / "out"
    with out.open("w") as file:
        subprocess.run([sys.executable, "-c", code, "/dev/stdout", str(out)], stdout=file, check=True)
    assert out.read_text() == "first\ndata\ndata\nlast\n"


def test_a_line_that_finds_no_room(tmp_path: Path) -> None:
    append_line(tmp_path / "log", "one")
    append_line(tmp_path / "log", "two")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    (tmp_path / "full").symlink_to("/dev/full")
    for path in (tmp_path / "full", tmp_path / "gone" / "log"):
        with pytest.raises(WriteError) as error:
            append_line(path, "three")
        assert str(error.value).startswith(f"{path}: ")


# What is given as a file to come → whether it is refused, also if it must be a plain file.
OUTPUTS = {
    "new": (False, False),
    "no/such/folder/yet": (False, False),
    "file": (False, False),
    "link": (False, False),
    "/dev/null": (False, True),
    "pipe": (False, True),
    "folder": (True, True),
    "link to folder": (True, True),
    "file/below": (True, True),
    "n" * 300: (True, True),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_checked_before_the_work(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(OLD)
    Path("folder").mkdir()
    Path("link").symlink_to("file")
    Path("link to folder").symlink_to("folder")
    os.mkfifo("pipe")
    before = sorted(tmp_path.rglob("*"))
    for plain, refused in zip((False, True), OUTPUTS[name], strict=True):
        if not refused:
            check_output(name, "out", plain=plain)
            continue
        with pytest.raises(InputError) as error:
            check_output(name, "out", plain=plain)
        assert error.value.argument == "out"
        assert name[:200] in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before, "nothing was made"


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch) -> None:
    """As root every folder may be, so the answer is made up."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(InputError, match="cannot be written to"):
        check_output(tmp_path / "new" / "file", "out")
