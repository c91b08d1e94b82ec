"""A run folder holds what a resume could not compute again; places and loaders may change, what they hold may not."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import command, same_run
from PIL import Image
from safetensors.torch import load_file

from engine import train
from engine.configuration import build
from engine.configuration.config import Config
from engine.configuration.inputs import open_data
from engine.representation.pretraining import training
from engine.representation.pretraining.recipe import one_cycle
from engine.support.errors import Interrupted

pytestmark = pytest.mark.usefixtures("own_cache", "briefly")


@pytest.fixture(scope="module")
def briefly():
    """Pretraining takes three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.representation.pretraining.recipe.DEFAULT_STEPS", (3, 3))
        yield


@pytest.fixture(scope="module")
def photos(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The forty digits in files of two sizes, so that a resizer has something to do."""
    folder = tmp_path_factory.mktemp("photos")
    for index, image in enumerate(np.load(pictures)):
        Image.fromarray(image).resize((40 + index % 2, 40)).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def pretraining(flags: list[str], photos: Path) -> list[str]:
    """The flags of a run of six steps whose extractor is pretrained on the files."""
    return [*flags, "--data", str(photos), "--weights", "pretrain", "--extractor", "vgg-small"]


@pytest.fixture(scope="module")
def whole(pretraining: list[str], own_cache, briefly, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*pretraining, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def half(pretraining: list[str], whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of it. Not to be changed; copy it."""
    out = tmp_path_factory.mktemp("runs") / "half"
    train.main([*pretraining, "--steps", "4", "--out", str(out)])
    return out


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch) -> None:
    """Another machine: an empty cache, and nothing comes out with the same bits."""

    def other(*_: object, **__: object) -> None:
        raise AssertionError("was computed again")

    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "other cache"))
    monkeypatch.setattr(build, "pretrain", other)
    monkeypatch.setattr("engine.comparison.reference.cache.compute_reference", other)


@pytest.mark.parametrize("change", ["nothing", "data moved", "loader"])
def test_resumes_elsewhere(change: str, half, whole, photos, tmp_path: Path, elsewhere) -> None:
    out, argv = tmp_path / "run", ["--steps", "6"]
    shutil.copytree(half, out)
    if change == "data moved":
        argv += ["--data", str(shutil.copytree(photos, tmp_path / "moved"))]
    if change == "loader":
        argv += ["--loader", "dali"]
    train.main(["--resume", "--out", str(out), *argv])
    assert same_run(out, whole)
    assert list((out / "extractor").iterdir()) == [out / "extractor/vgg-small.safetensors"]


def test_files_that_were_given_may_move(flags: list[str], whole: Path, tmp_path: Path, elsewhere) -> None:
    weights, target, out = tmp_path / "a.safetensors", tmp_path / "target.safetensors", tmp_path / "run"
    shutil.copy(whole / "extractor/vgg-small.safetensors", weights)
    shutil.copy(whole / "target.safetensors", target)
    data = str(Config.load(whole / "config.json").data.data)
    given = ["--data", data, "--weights", str(weights), "--target", str(target)]
    train.main([*flags, *given, "--steps", "4", "--out", str(out)])
    shutil.move(weights, tmp_path / "b.safetensors")
    target.unlink()
    moved = ["--weights", str(tmp_path / "b.safetensors"), "--target", str(tmp_path / "nowhere")]
    train.main(["--resume", "--out", str(out), *moved, "--steps", "6"])
    assert same_run(out, whole)


@pytest.mark.parametrize("part", ["extractor/vgg-small.safetensors", "target.safetensors"])
@pytest.mark.parametrize("fate", ["removed", "damaged"])
def test_what_is_lost_is_made_again(part: str, fate: str, half: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(half, out)
    kept = (out / part).read_bytes()
    (out / part).unlink() if fate == "removed" else (out / part).write_bytes(kept[: len(kept) // 2])
    train.main(["--resume", "--out", str(out), "--steps", "6"])
    assert same_run(out, whole)
    assert (out / part).read_bytes() == kept


@pytest.mark.parametrize("kept", [True, False], ids=["target kept", "target lost"])
@pytest.mark.parametrize("what", ["pictures", "weights"])
def test_another_content_is_refused(what: str, kept: bool, half, photos, tmp_path: Path, capsys, caplog) -> None:
    out, other = tmp_path / "run", tmp_path / "photos"
    shutil.copytree(half, out)
    shutil.copytree(photos, other)
    argv = ["--resume", "--out", str(out), "--steps", "6", "--data", str(other)]
    if what == "pictures":
        Image.new("RGB", (40, 40)).save(other / "00.png")
    else:
        weights = load_file(out / "extractor/vgg-small.safetensors")
        torch.save({name: value + 1 for name, value in weights.items()}, tmp_path / "other.pth")
        argv += ["--weights", str(tmp_path / "other.pth")]
    if not kept:
        (out / "target.safetensors").unlink()
    before = (out / "generator.safetensors").read_bytes()
    code, errors = command(train.main, argv, capsys)
    line = errors.splitlines()[-1]
    assert code == 2
    assert what in line
    assert str(out) in line
    digests = [word for word in line.split() if len(word) >= 16 and set(word) <= set("0123456789abcdef")]
    assert not digests
    assert (out / "generator.safetensors").read_bytes() == before
    caplog.clear()
    try:
        command(train.main, [*argv, "--verbose"], capsys)
        assert any(record.levelno == logging.DEBUG for record in caplog.records)
    finally:
        logging.getLogger("gfmn").setLevel(logging.INFO)


def interrupt_at(patch: pytest.MonkeyPatch, step: int) -> list[int]:
    """A real Ctrl-C in the middle of pretraining's step `step` of three; returns the steps that are taken."""
    taken: list[int] = []

    def interrupted(before: int, total: int) -> float:
        taken.append(before + 1)
        if before + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return one_cycle(before, total)

    patch.setattr(training, "one_cycle", interrupted)
    return taken


@pytest.mark.parametrize("fate", ["kept", "damaged", "of other settings"])
def test_pretraining_inside_training_resumes(fate: str, pretraining, whole, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    argv = [*pretraining, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        if fate == "of other settings":
            patch.setattr("engine.representation.pretraining.recipe.DEFAULT_STEPS", (4, 4))
        with pytest.raises(Interrupted):
            train.main(argv)
    assert not (tmp_path / "run").exists()
    (partial,) = (tmp_path / "cache/extractors").iterdir()
    if fate == "damaged":
        partial.write_bytes(partial.read_bytes()[:1000])
    taken = interrupt_at(monkeypatch, 0)
    train.main(argv)
    assert taken == ([3] if fate == "kept" else [1, 2, 3])
    assert same_run(tmp_path / "run", whole)
    assert not partial.exists()


def test_two_jobs_pretrain_an_extractor_once(whole: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    config = Config.load(whole / "config.json")
    pretrain, made = build.pretrain, []

    def slowly(*arguments, **options):
        made.append(arguments[0])
        time.sleep(0.3)
        return pretrain(*arguments, **options)

    bare, one_at_a_time = build.bare_extractor, threading.Lock()

    def alone(*arguments, **options):
        with one_at_a_time:  # jobs are processes, and torch.fx traces in one thread only
            return bare(*arguments, **options)

    monkeypatch.setattr(build, "pretrain", slowly)
    monkeypatch.setattr(build, "bare_extractor", alone)
    found: list[dict[str, Path]] = []

    def job() -> None:
        found.append(build.pretrained_files(config, open_data(config), torch.device("cpu")))

    jobs = [threading.Thread(target=job) for _ in range(2)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join()
    assert made == ["vgg-small"]
    assert found[0] == found[1]


def test_pretraining_and_the_pass_tell_how_far_they_are(pretraining, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("engine.training.progress.LINE_EVERY", 0.0)
    with caplog.at_level("INFO", logger="gfmn"):
        train.main([*pretraining, "--steps", "1", "--out", str(tmp_path / "run")])
    for what in ("reading images: 40/40", "pretraining vgg-small: 3/3", "target moments: 40/40"):
        assert what in caplog.text


def test_a_network_is_pretrained_on_what_the_loader_decodes(photos: Path, tmp_path: Path, monkeypatch) -> None:
    """And one that is pretrained on DALI's pictures is another, also in the cache."""
    pytest.importorskip("nvidia.dali")
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    asked: list[str] = []

    def pretrain(*_: object, loader: str, **__: object) -> SimpleNamespace:
        asked.append(loader)
        return SimpleNamespace(metric="accuracy", validation=1.0, save=Path.touch)

    monkeypatch.setattr(build, "pretrain", pretrain)
    found = []
    for loader in ("torch", "dali"):
        given = {"dataset": "images", "data": str(photos), "loader": loader, "weights": ["pretrain"]}
        config = Config.build("digits", {**given, "extractor": "vgg-small"})
        found.append(build.pretrained_files(config, open_data(config), torch.device("cpu"))["vgg-small"])
    assert asked == ["torch", "dali"]
    assert found[0] != found[1]
