"""The precompute command from outside: every format, killed and resumed, in several processes, with bad images."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.marks import quick, slow
from helpers.runs import start
from helpers.tiny_datasets import cut, make_celeba, make_cifar10, make_fashion, make_lsun, make_stl10
from PIL import Image

from engine import precompute, train
from engine.comparison.distances.moments import Moments
from engine.configuration.command import run_command

FLAGS = ["--weights", "random", "--layers", "2", "--batch-size", "4", "--kernels", "reference"]
FLAGS += ["--loader", "torch", "--threads", "1"]
FORMATS = {"digits": 1797, "cifar10": 35, "fashion": 21, "stl10": 23, "celeba": 19, "lsun": 17, "images": 12, "npy": 20}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


@pytest.fixture
def folder(photos: list[np.ndarray], tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, image in enumerate(cut(photos, 12, 40, 48)):
        Image.fromarray(image).save(folder / f"{n:02d}.{'jpg' if n % 2 else 'png'}")
    return folder


@pytest.mark.parametrize("name", quick(FORMATS, ["digits", "stl10", "images", "npy"]))
def test_every_format_precomputes_and_trains_ten_steps(
    name: str, photos: list[np.ndarray], folder: Path, tmp_path: Path, monkeypatch
) -> None:
    root = tmp_path / "data"
    argv = [*FLAGS, "--dataset", name, "--data", str(root)]
    if name == "digits":
        argv = [*FLAGS, "--batch-size", "64"]
    elif name == "images":
        argv = [*FLAGS, "--data", str(folder)]
    elif name == "npy":
        np.save(tmp_path / "data.npy", cut(photos, 20, 32, 32))
        argv = [*FLAGS, "--data", str(tmp_path / "data.npy")]
    elif name in (makers := {"cifar10": make_cifar10, "fashion": make_fashion, "stl10": make_stl10}):
        makers[name](root, photos, monkeypatch)
    elif name == "celeba":
        make_celeba(root, photos)
    else:
        pytest.importorskip("lmdb")
        make_lsun(root, photos)
    out = tmp_path / "target.safetensors"
    precompute.main([*argv, "--out", str(out)])
    target = Moments.load(out)
    assert target.count == FORMATS[name]
    assert (target.variance() > 0).any()
    more = ["--target", str(out), "--steps", "10", "--nz", "8", "--out", str(tmp_path / "run")]
    train.main([*argv, *more])
    assert (tmp_path / "run/generator.safetensors").exists()
    assert sorted(path.name for path in tmp_path.glob("target*")) == ["target.safetensors"]


SLOWLY = """
import time
import engine.comparison.reference.statistics_pass
from engine.representation.feature_pass import FeaturePass
engine.comparison.reference.statistics_pass.SAVE_EVERY = 0
collect = FeaturePass.collect
def slowly(*arguments):
    time.sleep(0.02)
    collect(*arguments)
FeaturePass.collect = slowly
"""


@pytest.mark.parametrize("how", [slow("kill -9"), "Ctrl-C", slow("kill -9 while saving")])
def test_stopped_and_run_again_gives_the_same_file(how: str, tmp_path: Path, monkeypatch) -> None:
    argv = [*FLAGS, "--batch-size", "17"]
    precompute.main([*argv, "--out", str(tmp_path / "whole.safetensors")])
    out, partial = tmp_path / "parts.safetensors", tmp_path / "parts.safetensors.partial"
    prelude = SLOWLY
    if how == "kill -9 while saving":
        prelude += """
import os, signal
replace, seen = os.replace, []
def replace_or_die(source, target):
    seen.append(target)
    if len(seen) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
"""
    process = start([*argv, "--out", str(out)], prelude, module="engine.precompute")
    deadline = time.monotonic() + 120
    while not partial.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if how != "kill -9 while saving":
        process.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == "Ctrl-C" else -signal.SIGKILL), errors
    assert "Traceback" not in errors
    assert ("the same command resumes there" in errors) == (how == "Ctrl-C")
    assert partial.exists()
    assert not out.exists()
    assert bool(list(tmp_path.glob(".*.tmp"))) == (how == "kill -9 while saving")
    precompute.main([*argv, "--out", str(out)])
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert left == ["parts.safetensors", "whole.safetensors"]


def torchrun(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "engine.precompute", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_two_processes_give_the_same_target(tmp_path: Path) -> None:
    argv = [*FLAGS, "--batch-size", "32"]
    precompute.main([*argv, "--out", str(tmp_path / "one.safetensors")])
    result = torchrun([*argv, "--out", str(tmp_path / "two.safetensors")])
    assert result.returncode == 0, result.stderr
    one, two = Moments.load(tmp_path / "one.safetensors"), Moments.load(tmp_path / "two.safetensors")
    assert (one.count, one.fingerprint) == (two.count, two.fingerprint) == (1797, one.fingerprint)
    np.testing.assert_allclose(two.mean.numpy(), one.mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(two.m2.numpy(), one.m2.numpy(), rtol=1e-6, atol=1e-12)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_error_of_one_process_ends_all_with_one_line(folder: Path, tmp_path: Path) -> None:
    (folder / "09.jpg").write_bytes((folder / "09.jpg").read_bytes()[:200])
    out = tmp_path / "two.safetensors"
    result = torchrun([*FLAGS, "--data", str(folder), "--out", str(out)])
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert "09.jpg" in lines[0]
    assert not out.exists()


def test_bad_images_stop_or_are_counted_and_listed(folder: Path, tmp_path: Path, capsys) -> None:
    for n in (3, 8):
        bad = next(folder.glob(f"{n:02d}.*"))
        bad.write_bytes(bad.read_bytes()[:100])
    out = tmp_path / "target.safetensors"
    argv = [*FLAGS, "--data", str(folder), "--out", str(out)]
    with pytest.raises(SystemExit) as exit_:
        run_command(precompute.main, argv)
    errors = capsys.readouterr().err
    assert (exit_.value.code, errors.count("\n")) == (2, 1), errors
    assert "03.jpg" in errors
    assert not out.exists()
    precompute.main([*argv, "--skip-bad-images"])
    assert Moments.load(out).count == 10
    listed = (tmp_path / "target.bad_images.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [str(folder / "03.jpg"), str(folder / "08.png")]


def test_training_finds_what_precompute_made(folder: Path, tmp_path: Path, monkeypatch) -> None:
    argv = [*FLAGS, "--data", str(folder)]
    precompute.main([*argv, "--out", str(tmp_path / "target.safetensors")])
    monkeypatch.setattr("engine.comparison.reference.statistics_pass.FeaturePass", None)
    train.main([*argv, "--steps", "1", "--nz", "8", "--out", str(tmp_path / "run")])
    with pytest.raises(TypeError):
        train.main([*argv, "--steps", "1", "--nz", "8", "--amp", "--out", str(tmp_path / "other")])


def test_out_that_is_there_already(folder: Path, tmp_path: Path, caplog) -> None:
    out = tmp_path / "target.safetensors"
    argv = [*FLAGS, "--data", str(folder), "--out", str(out)]
    precompute.main(argv)
    before = out.stat().st_mtime_ns
    precompute.main(argv)
    assert out.stat().st_mtime_ns == before
    precompute.main([*argv, "--seed", "5"])
    assert out.stat().st_mtime_ns != before
    out.write_text("something else")
    precompute.main(argv)
    assert Moments.load(out).count == 12
