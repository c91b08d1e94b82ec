"""What a method cannot compare, and settings that decide nothing: one line each, before a network is pretrained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.runs import command

from engine import precompute, train
from engine.configuration import build
from engine.configuration.config import Config
from engine.configuration.presets import COMPARING_PRESETS
from engine.support.errors import InputError
from engine.training.ranks import Ranks

pytestmark = pytest.mark.usefixtures("own_cache")

VIT = "vgg-small+timm:vit_tiny_patch16_224"
OF_40 = {
    "covariance": (
        ["--method", "frechet", "--population", "ema", "--pool", "none"],
        "--population: a moving covariance",
    ),
    "covariance of a plan": (
        ["--method", "frechet", "--population", "ema", "--pool", "none", "--plan"],
        "--population: a moving covariance",
    ),
    "landmarks": (["--method", "mmd", "--mmd-landmarks", "41"], "--mmd-landmarks: must be from 1 to the number of"),
    "landmarks of a bank": (
        ["--method", "mmd", "--mmd-landmarks", "31", "--mmd-images", "30"],
        "--mmd-landmarks: must be at most --mmd-images, 30; got 31",
    ),
    "tokens of gfmn": (["--extractor", VIT], "--method: gfmn matches variances at every place of a map"),
    "tokens on a grid": (
        ["--method", "mmd", "--pool", "grid2", "--extractor", VIT],
        "--pool: grid2 is of a map's places",
    ),
    "every token's covariance": (
        ["--method", "frechet", "--pool", "none", "--population", "ema", "--extractor", VIT],
        "--population: a moving covariance",
    ),
    "averager of a population": (["--population", "ema", "--averager", "ama"], "--averager: --population ema takes"),
    "rate of a population": (["--population", "ema", "--ama-lr", "1e-3"], "--ama-lr: --population ema takes"),
    "average of a population": (["--population", "ema", "--ma-alpha", "1"], "--ma-alpha: --population ema takes"),
    "AMA's rate": (["--averager", "ma", "--ama-lr", "1e-3"], "--ama-lr: needs --averager ama, and this is"),
    "AMA's variant": (["--averager", "none", "--ama-variant", "paper"], "--ama-variant: needs --averager ama"),
    "MA's rate": (["--ma-alpha", "0.5"], "--ma-alpha: needs --averager ma, and this is --averager ama"),
    "MA's variant": (["--averager", "none", "--ma-variant", "authors"], "--ma-variant: needs --averager ma"),
    "one network's loss": (["--method", "mmd", "--normalise-losses"], "--normalise-losses: needs several networks"),
    "no mixed precision": (["--amp-dtype", "fp16"], "--amp-dtype: needs --amp"),
    "no evaluations' samples": (["--evaluate-samples", "9"], "--evaluate-samples: needs --evaluate-every N"),
    "no evaluations' network": (["--evaluate-extractor", "vgg19"], "--evaluate-extractor: needs --evaluate-every N"),
    "no evaluations' weights": (["--evaluate-weights", "own"], "--evaluate-weights: needs --evaluate-every N"),
    "upsampling of dcgan": (
        ["--generator", "resnet", "--upsampling", "bilinear"],
        "--upsampling: --generator resnet has its own, nearest",
    ),
    "upsampling of resnet": (
        ["--generator", "resnet", "--upsampling", "nearest"],
        "--upsampling: --generator resnet has its own, nearest",
    ),
    "broken minibatches": (
        ["--population", "queue", "--population-images", "10"],
        "--population-images: gfmn's queue is of whole minibatches of 4, 10 is not; give 8 or 12",
    ),
}
OF_1 = {
    "gfmn": "1 usable image has no variance; give at least 2, or --correction 0",
    "frechet": "1 usable image has no covariance; give at least 2",
    **dict.fromkeys(("mmd", "sinkhorn", "drifting", "gmmn"), "1 usable image is too few for --method"),
}


@pytest.fixture(autouse=True)
def no_pretraining(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretrain(*_: object, **__: object) -> None:
        raise AssertionError("a network is pretrained")

    monkeypatch.setattr(build, "pretrain", pretrain)


@pytest.mark.parametrize("case", OF_40)
def test_one_line(case: str, flags: list[str], tmp_path: Path, capsys) -> None:
    given, line = OF_40[case]
    code, errors = command(
        train.main, [*flags, "--weights", "pretrain", *given, "--out", str(tmp_path / "run")], capsys
    )
    assert code == 2
    assert [entry for entry in errors.splitlines() if "error" in entry] == [errors.splitlines()[-1]]
    assert line in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", OF_1)
@pytest.mark.parametrize("main", [train.main, precompute.main], ids=["train", "precompute"])
def test_too_few_images(main, method: str, tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "one.npy", np.zeros((1, 32, 32, 3), dtype=np.uint8))
    given = ["--data", str(tmp_path / "one.npy"), "--extractor", "vgg-small", "--threads", "1", "--method", method]
    code, errors = command(main, [*given, "--out", str(tmp_path / "out")], capsys)
    assert code == 2
    assert f"--data: {OF_1[method]}" in errors.splitlines()[-1]


def test_whole_batches_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def two() -> Iterator[Ranks]:
        yield Ranks(0, 2, dist.HashStore())

    monkeypatch.setattr(precompute, "job", two)
    with pytest.raises(InputError, match="in one process, not 2") as error:
        precompute.main(["--extractor-bn", "batch", "--extractor", "resnet18", "--out", str(tmp_path / "target")])
    assert error.value.argument == "extractor_bn"


@pytest.mark.parametrize("preset", COMPARING_PRESETS)
def test_what_a_preset_sets_is_nobody_s_mistake(preset: str) -> None:
    """Its averager's rates decide nothing beside a population; only who gives them is told so."""
    data = {} if preset == "digits" else {"data": "x"}
    config = Config.build(preset, {**data, "population": "ema"})
    assert config.replaced({"steps": 5000}).population.population == "ema"
    assert Config.build(preset, {**data, "averager": "none"}).gfmn.averager == "none"
    with pytest.raises(InputError) as error:
        config.replaced({"ama_lr": config.gfmn.ama_lr})
    assert error.value.argument == "ama_lr"


def test_all_layers_of_one_network_are_the_same_from_both_ends() -> None:
    """Of several networks 16 of each are matched without --layers."""
    assert Config.build("digits", {"layers_from": "top", "extractor": "vgg19+resnet18"}).networks.layers is None
    with pytest.raises(
        InputError, match="needs --layers K, or several networks, and --extractor vgg19 is one"
    ) as error:
        Config.build("digits", {"layers_from": "top", "extractor": "vgg19"})
    assert error.value.argument == "layers_from"


def test_the_order_of_random_numbers_is_that_without_the_check(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    """Looking at shapes draws nothing that a run draws."""
    config = Config.build("digits", {"image_size": 8, "layers": 2})
    monkeypatch.setattr(build, "_pretrained", lambda *_: tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build.pretrained_files(config, np.zeros(4), torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
