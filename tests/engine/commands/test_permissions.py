"""What may not be read is said to be so, with its path, and never to be missing."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import command

from engine import evaluate, report, sample, train
from engine.configuration.inputs import load_run_sampler
from engine.support.errors import InputError
from engine.support.files import check_file, read_file, what_is

pytestmark = pytest.mark.usefixtures("own_cache")

# The command, its arguments, and the file or folder that is named.
CASES: list[tuple[Callable, str, str]] = [
    (train.main, "--config locked/config.json --out new", "locked/config.json"),
    (train.main, "--resume --out locked", "locked"),
    (train.main, "--weights locked/w.safetensors --out new", "locked/w.safetensors"),
    (train.main, "--weights random --target locked/t.safetensors --out new", "locked/t.safetensors"),
    (train.main, "--target locked/t.safetensors --out new", "locked/t.safetensors"),
    (sample.main, "--run locked --out new.npy", "locked"),
    (report.main, "--run locked --out new.html", "locked"),
    (evaluate.main, "--run locked --against locked", "locked"),
]


@pytest.fixture(params=["folder", "file"])
def locked(request, tmp_path: Path, monkeypatch) -> Path:
    """A folder that may not be entered, or whose files may not be read; as root, too, whom modes don't stop."""
    folder = tmp_path / "locked"
    folder.mkdir()
    for name in ("config.json", "w.safetensors", "t.safetensors", "generator.safetensors"):
        (folder / name).write_bytes(b"{}")

    def refusing(call: Callable) -> Callable:
        def refuse(path, *args, **options):
            if not isinstance(path, int) and folder in Path(os.fsdecode(path)).absolute().parents:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path, *args, **options)

        return refuse

    if request.param == "folder":
        monkeypatch.setattr(os, "stat", refusing(os.stat))
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", refusing(io.open))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(("main", "argv", "named"), CASES, ids=[f"{case[0].__module__} {case[1]}" for case in CASES])
def test_permission_is_said(main, argv: str, named: str, locked: Path, capsys) -> None:
    code, errors = command(main, argv.split(), capsys)
    assert code == 2
    *_, last = errors.splitlines()
    assert "Permission denied" in last
    assert named in last
    assert "Traceback" not in errors
    assert [path.name for path in locked.parent.iterdir()] == ["locked"]


def test_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    found = {name: what_is(tmp_path / name) for name in ("file", ".", "pipe", "broken", "nothing", "file/nothing")}
    assert found == {
        "file": "file",
        ".": "folder",
        "pipe": "other",
        "broken": None,
        "nothing": None,
        "file/nothing": None,
    }
    assert read_file(file) == b"abc"
    check_file(file)
    for name in (".", "pipe", "broken", "nothing", "a" * 5000):
        with pytest.raises(InputError) as error:
            check_file(tmp_path / name)
        assert error.value.argument == tmp_path / name


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize(("content", "said"), [([], "config.json"), (["config.json"], "--resume")])
def test_a_folder_without_a_generator(content: list[str], said: str, best: bool, tmp_path: Path) -> None:
    """The advice is a command that works: a run's folder can't be trained in anew."""
    folder = tmp_path / "it's a run"
    folder.mkdir()
    for name in content:
        (folder / name).write_text("{}")
    with pytest.raises(InputError, match=said) as error:
        load_run_sampler(folder, best=best)
    assert error.value.argument == "run"
    if content:
        assert shlex.split(error.value.message.partition("train it: ")[2])[-1] == str(folder)
