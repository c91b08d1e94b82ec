"""What every command writes: where it cannot, one line before the work; results that took long before any print."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.judging import write_weights
from helpers.runs import command

from engine import evaluate

pytestmark = pytest.mark.usefixtures("own_cache")

# Every command with its outputs, and what else it has to be given.
OUTPUTS = [
    ("engine.sample", "--out", "--run nothing"),
    ("engine.sample", "--codes", "--run nothing --encode a.png --out b.png"),
    ("engine.report", "--out", "--run nothing"),
    ("engine.evaluate", "--json", "--images nothing"),
    ("engine.precompute", "--out", ""),
    ("engine.pretrain", "--out", ""),
    ("bench.data", "--json", ""),
    ("bench.data", "--plot", ""),
    ("bench.throughput", "--json", ""),
    ("bench.memory.__main__", "--json", ""),
    ("bench.memory.__main__", "--plot", ""),
    ("bench.kernels.__main__", "--json", ""),
    ("bench.gpu", "--json", ""),
    ("bench.paper.__main__", "--json", "--experiment layers"),
    ("bench.paper.__main__", "--figure", "--experiment layers"),
]


@pytest.mark.parametrize(("module", "flag", "rest"), OUTPUTS, ids=lambda text: text)
@pytest.mark.parametrize("path", ["folder", "file/below", "n" * 300], ids=lambda path: path[:10])
def test_refused_before_the_work(module: str, flag: str, rest: str, path: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("")
    status, errors = command(importlib.import_module(module).main, [*rest.split(), flag, path], capsys)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert flag in errors
    assert path[:200] in errors
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]


# Every command with two outputs, or with an output and files that it reads.
TWO_FILES = [
    ("engine.sample", "--out", "--codes", "--run nothing --encode a.png"),
    ("bench.data", "--json", "--plot", ""),
    ("bench.memory.__main__", "--json", "--plot", ""),
    ("bench.paper.__main__", "--json", "--figure", "--experiment layers"),
    ("engine.sample", "--encode", "--out", "--run nothing"),
    ("engine.sample", "--encode b.npy", "--out", "--run nothing"),
    ("engine.evaluate", "--images", "--json", "--against nothing"),
    ("engine.evaluate", "--against", "--json", "--images nothing"),
    ("engine.evaluate", "--weights", "--json", "--images nothing"),
]


@pytest.mark.parametrize(("module", "one", "other", "rest"), TWO_FILES, ids=lambda text: text)
@pytest.mark.parametrize("spelling", ["x.npy", "./x.npy", "{here}/x.npy", "link.npy"])
def test_a_result_in_another_s_file_is_refused(
    module: str, one: str, other: str, rest: str, spelling: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("link.npy").symlink_to("x.npy")
    one, *more = one.split()
    argv = [*rest.split(), one, *more, "x.npy", other, spelling.format(here=tmp_path)]
    status, errors = command(importlib.import_module(module).main, argv, capsys)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert f"{other}: {Path(spelling.format(here=tmp_path))} is the file of {one}; name another" in errors
    assert os.listdir(tmp_path) == ["link.npy"]


@pytest.mark.parametrize("module", ["engine.precompute", "engine.pretrain"])
def test_more_files_stand_beside_these(module: str, tmp_path: Path, capsys) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/full")
    status, errors = command(importlib.import_module(module).main, ["--out", str(link)], capsys)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert "--out" in errors
    assert os.listdir(tmp_path) == ["link"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An evaluation of a second."""
    folder = tmp_path_factory.mktemp("judged")
    for name, seed in (("a.npy", 0), ("b.npy", 1)):
        np.save(folder / name, np.random.default_rng(seed).integers(0, 256, (12, 32, 32, 3), np.uint8))
    weights = write_weights(folder / "small.safetensors")
    flags = f"--images {folder}/a.npy --against {folder}/b.npy --metrics kid --kid-subset-size 4 --threads 1"
    return [*flags.split(), "--feature-extractor", "vgg-small", "--weights", str(weights)]


def test_a_result_is_written_before_it_is_printed(judged: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("engine.evaluate.print", full, raising=False)
        status, errors = command(evaluate.main, [*judged, "--json", str(tmp_path / "numbers.json")], capsys)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert json.loads((tmp_path / "numbers.json").read_text())["metrics"]


def test_a_device_gets_the_result_and_stays(judged: list[str], tmp_path: Path, capsys) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/full")
    status, errors = command(evaluate.main, [*judged, "--json", str(link)], capsys)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert str(link) in errors
    assert link.is_symlink()
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize(
    ("streams", "status"), [("stdout", 2), ("stderr", 0), ("stdout stderr", 2)], ids=lambda value: str(value)
)
def test_streams_that_take_nothing(streams: str, status: int) -> None:
    code = """
import logging
from engine.configuration.command import run_command
def main(argv):
    logging.getLogger("gfmn").warning("warning")
    print("result")
run_command(main)
"""
    with open("/dev/full", "w") as full:
        given = {name: full if name in streams else subprocess.PIPE for name in ("stdout", "stderr")}
        process = subprocess.run([sys.executable, "-c", code], text=True, **given)
    assert process.returncode == status
    if "stderr" not in streams:
        assert [line for line in process.stderr.splitlines() if "disk is full" in line] == process.stderr.splitlines()[
            1:
        ]
