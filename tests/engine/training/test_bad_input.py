"""Mistakes on the training command's line: one clear line each, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import command

from engine import train
from engine.configuration.config import Config

pytestmark = pytest.mark.usefixtures("own_cache")

BAD_INPUT = {
    "preset": (["--preset", "nothing"], "--preset"),
    "extractor": (["--extractor", "nothing"], "--extractor"),
    "extractor in a pair": (["--extractor", "vgg-small+nothing"], "nothing"),
    "generator": (["--generator", "nothing"], "--generator"),
    "data that is not there": (["--data", "no/such/folder"], "no/such/folder"),
    "empty folder": (["--data", "EMPTY"], "EMPTY"),
    "image size of the extractor": (["--image-size", "36"], "36"),
    "image size of the generator": (["--image-size", "48"], "48"),
    "minibatch of one": (["--batch-size", "1"], "--batch-size"),
    "not a number": (["--batch-size", "many"], "--batch-size"),
    "no steps": (["--steps", "0"], "--steps"),
    "learning rate": (["--lr", "-1"], "--lr"),
    "AMA's learning rate": (["--ama-lr", "0"], "--ama-lr"),
    "moving average": (["--averager", "ma", "--ma-alpha", "2"], "--ma-alpha"),
    "chunk larger than minibatch": (["--chunk-size", "5"], "--chunk-size"),
    "chunks with batch statistics": (["--chunk-size", "2", "--extractor-bn", "batch"], "--chunk-size"),
    "contradicting kernels": (["--no-fused-ama", "--kernels", "compiled"], "--no-fused-ama"),
    "ema": (["--generator-ema", "1"], "--generator-ema"),
    "several emas": (["--generator-ema", ".9,1"], "--generator-ema: must be positive and below 1, got 1.0"),
    "an ema twice": (["--generator-ema", ".9,0.9"], "--generator-ema: has the same decay twice"),
    "emas of words": (["--generator-ema", "a,b"], "--generator-ema: 'a,b' is neither a number nor several"),
    "ema that is not kept": (
        ["--generator-ema", ".9,.99", "--sample-ema", ".999"],
        "--sample-ema: 0.999 is not among --generator-ema 0.9, 0.99",
    ),
    "ema of none": (["--preset", "cifar10", "--sample-ema", ".999"], "--sample-ema: needs --generator-ema"),
    "warm-up until the end": (["--warmup-steps", "6"], "--warmup-steps: 6 steps of warm-up leave none of 6 --steps"),
    "negative clip": (["--clip-grad", "-1"], "--clip-grad: must be positive"),
    "clip of nothing": (["--clip-grad", "0"], "--clip-grad: must be positive"),
    "unknown optimizer": (["--optimizer", "sgd"], "--optimizer"),
    "decay of adam": (["--weight-decay", "0.1"], "--weight-decay: --optimizer adam has none"),
    "final rate of a constant": (["--lr-final", "1e-6"], "--lr-final: needs a --lr-schedule that falls"),
    "final rate above the first": (
        ["--lr-schedule", "cosine", "--lr-final", "1"],
        "--lr-final: 1.0 is more than --lr",
    ),
    "layers": (["--layers", "0"], "--layers"),
    "weights that are not there": (["--weights", "nothing.safetensors"], "nothing.safetensors"),
    "weights for one of two": (["--extractor", "vgg-small+vgg-small", "--weights", "a"], "--weights"),
    "target that is not there": (["--target", "nothing.safetensors"], "nothing.safetensors"),
    "unknown flag": (["--frobnicate"], "--frobnicate"),
    "resume without out": (["--resume"], "--resume"),
    "unknown method": (["--method", "nothing"], "--method"),
    "unknown kernel": (["--method", "mmd", "--mmd-kernel", "nothing"], "--mmd-kernel"),
    "unknown pool": (["--method", "mmd", "--pool", "grid0"], "--pool"),
    "bandwidth of nothing": (["--method", "mmd", "--mmd-bandwidths", "1", "0"], "--mmd-bandwidths: must be positive"),
    "bandwidth that is no number": (["--method", "mmd", "--mmd-bandwidths", "nan"], "--mmd-bandwidths"),
    "bandwidths of a kernel without": (
        ["--method", "mmd", "--mmd-kernel", "energy", "--mmd-bandwidths", "1"],
        "--mmd-kernel energy",
    ),
    "degree": (["--method", "mmd", "--mmd-kernel", "polynomial", "--mmd-degree", "0"], "--mmd-degree"),
    "a flag of another method": (
        ["--method", "mmd", "--averager", "ma"],
        "--averager: belongs to --method gfmn, and this is --method mmd",
    ),
    "a flag of mmd": (["--mmd-kernel", "energy"], "--mmd-kernel: belongs to --method mmd, and this is --method gfmn"),
    "degree of a kernel without": (["--method", "mmd", "--mmd-degree", "5"], "--mmd-degree"),
    "Triton on a CPU": (["--kernels", "triton"], "--kernels: the triton backend cannot run here"),
    "unknown prior": (["--prior", "nothing"], "--prior"),
    "an abbreviated flag": (["--batch", "4"], "--batch"),
    "config that is not there": (["--config", "nothing.json"], "nothing.json"),
}


@pytest.mark.parametrize("case", BAD_INPUT, ids=str)
def test_bad_input_is_one_line(case: str, flags, tmp_path: Path, monkeypatch, capsys) -> None:
    argv, mention = BAD_INPUT[case]
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    base = [] if argv[0] == "--config" else flags
    out = [] if "--resume" in argv else ["--out", "run"]
    code, errors = command(train.main, [*base, *argv, *out], capsys)
    assert code == 2
    # Before the error there may be lines on what was done: they never say "error".
    lines = [line for line in errors.splitlines() if "error" in line]
    assert len(lines) == 1, errors
    assert mention in lines[0]
    assert "Traceback" not in errors


def test_data_set_without_a_path(tmp_path: Path, capsys) -> None:
    code, errors = command(train.main, ["--dataset", "celeba", "--out", str(tmp_path / "run")], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "needs a path to its files (--data)" in errors


@pytest.mark.parametrize(
    ("images", "argv", "mentions"),
    [
        (3, [], ["--weights", "random", "3"]),
        (1, ["--weights", "random"], ["--data", "--correction 0"]),
        (1, ["--weights", "random", "--method", "mmd"], ["--data"]),
    ],
    ids=["pretraining", "moments", "mmd"],
)
def test_too_few_images_and_the_way_around(images: int, argv, mentions, tmp_path: Path, capsys) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "few.npy", pictures)
    base = [
        "--extractor",
        "vgg-small",
        "--data",
        str(tmp_path / "few.npy"),
        "--layers",
        "1",
        "--batch-size",
        "4",
        "--no-fused-ama",
    ]
    code, errors = command(train.main, [*base, *argv, "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    *_, last = errors.splitlines()
    assert last.startswith(f"error: {mentions[0]}: ")
    assert all(mention in last for mention in mentions)


def test_a_target_that_is_not_there_is_found_before_pretraining(tmp_path: Path, capsys) -> None:
    argv = ["--target", str(tmp_path / "nothing.safetensors"), "--out", str(tmp_path / "run")]
    code, errors = command(train.main, argv, capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "nothing.safetensors" in errors


@pytest.mark.parametrize(("extractor", "offered"), [("vgg19", True), ("vgg19+resnet18", False)])
def test_imagenet_is_offered_where_there_are_weights(extractor: str, offered: bool, tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "images.npy", np.zeros((4, 32, 32, 3), dtype=np.uint8))
    argv = ["--preset", "cifar10", "--dataset", "images", "--data", str(tmp_path / "images.npy")]
    code, errors = command(train.main, [*argv, "--extractor", extractor, "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    assert "--weights" in errors
    assert ("'imagenet'" in errors) == offered


def test_cuda_without_a_gpu_is_one_line(flags, tmp_path: Path, capsys) -> None:
    code, errors = command(train.main, [*flags, "--device", "cuda", "--out", str(tmp_path / "run")], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "--device" in errors


def test_preset_without_weights_or_data_is_one_line(tmp_path: Path, capsys) -> None:
    for preset in ("cifar10", "stl10", "celeba64", "celeba128", "lsun64"):
        code, errors = command(train.main, ["--preset", preset, "--out", str(tmp_path / "run")], capsys)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert not (tmp_path / "run").exists()


def test_out_that_holds_another_run(finished: Path, flags, tmp_path: Path, capsys) -> None:
    code, errors = command(train.main, [*flags, "--out", str(finished)], capsys)
    assert code == 2
    assert "--resume" in errors
    (tmp_path / "notes.txt").write_text("not a run")
    code, errors = command(train.main, [*flags, "--out", str(tmp_path)], capsys)
    assert code == 2
    assert str(tmp_path) in errors
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_refuses_what_would_change_the_result(finished: Path, capsys, tmp_path: Path) -> None:
    code, errors = command(train.main, ["--resume", "--out", str(finished), "--lr", "0.1"], capsys)
    assert code == 2
    assert "--lr" in errors
    code, errors = command(train.main, ["--resume", "--out", str(tmp_path / "nothing")], capsys)
    assert code == 2
    assert "nothing" in errors


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        (lambda config: config["method"].update(method="nothing"), "method: 'nothing' is not one of gfmn, mmd"),
        (lambda config: config["gfmn"].update(averager="nothing"), "averager: 'nothing' is not one of"),
        (lambda config: config["training"].update(unheard_of=1), "there is no setting 'unheard_of'"),
        (lambda config: config.pop("preset"), "there is no 'preset'"),
    ],
    ids=["method", "averager", "setting", "preset"],
)
def test_configuration_of_nonsense_is_one_line(change, mention: str, finished: Path, tmp_path: Path, capsys) -> None:
    config = json.loads((finished / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]
    code, errors = command(train.main, argv, capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert str(tmp_path / "config.json") in errors
    assert mention in errors


def test_resume_of_another_method(finished: Path, capsys) -> None:
    code, errors = command(train.main, ["--resume", "--out", str(finished), "--method", "mmd"], capsys)
    assert code == 2
    assert "--method: the run was started with gfmn, it cannot be resumed with mmd" in errors
    code, errors = command(train.main, ["--resume", "--out", str(finished), "--pool", "mean"], capsys)
    assert code == 2
    assert "--pool" in errors
    assert "gfmn" in errors
    assert "mmd" in errors


def test_old_names_are_accepted_with_a_warning(finished: Path, flags, tmp_path: Path, caplog) -> None:
    more = ["--checkpoint", "stages", "--checkpoint-generator", "--steps", "1"]
    train.main([*flags, *more, "--out", str(tmp_path / "run")])
    said = [record.getMessage() for record in caplog.records if "is now called" in record.getMessage()]
    assert [line.split()[1] for line in said] == ["--checkpoint", "--checkpoint-generator"]
    assert [line.split()[5] for line in said] == ["--recompute;", "--recompute-generator;"]
    config = Config.load(tmp_path / "run" / "config.json")
    assert (config.matching.recompute, config.training.recompute_generator) == ("stages", True)
