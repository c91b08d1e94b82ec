"""Autoencoding runs from outside: resumed bit for bit, drawn as any other, one line for what makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.judging import write_weights
from helpers.marks import quick
from helpers.runs import command, metrics, refusal
from helpers.small_steps import configuration, resumed_equals_whole, small_trainer
from PIL import Image

from engine import precompute, report, sample, train
from engine.configuration.autoencoders import make_perceptual
from engine.configuration.autoencoding import needs_perceptual
from engine.configuration.config import Config
from engine.configuration.inputs import load_run_sampler

pytestmark = pytest.mark.usefixtures("own_cache")

RESUMED: dict[str, dict[str, Any]] = {
    "vae": {"method": "vae", "amp": True, "generator_ema": 0.9},
    "ae": {"method": "ae", "reconstruction": "pyramid"},
    "wae-gan": {"method": "wae", "divergence": "gan", "amp": True, "amp_dtype": "fp16"},
    "before the codes": {"method": "gmmn-ae", "autoencoder_steps": 3},
    "amid the codes": {"method": "gmmn-ae", "autoencoder_steps": 1},
}


@pytest.mark.parametrize("name", quick(RESUMED, ["vae", "before the codes"]))
def test_resumed_equals_uninterrupted(name: str) -> None:
    """Bit for bit: all networks, optimizers and remembered codes, the place among images and random numbers."""
    config = configuration("digits", {"batch_size": 3, **RESUMED[name]})
    changed = resumed_equals_whole(config)
    parts = {key.split(".")[0] for key in changed}
    # After one step the codes of three images are so alike that the mapping's gradient is below float32's squares.
    learnt = set() if name == "amid the codes" else {"generator", "encoder"}
    drawn = set() if name == "ae" else {"random"}
    assert parts >= {*learnt, *drawn, "optimizer", "images"}


PRIORS = {"gmmn-ae": "mapped", "vae": "gaussian", "ae": "fitted", "wae": "gaussian"}


@pytest.mark.parametrize("name", quick(PRIORS, ["gmmn-ae"]))
def test_a_run_is_resumed_drawn_and_reported(name: str, pictures: Path, tmp_path: Path) -> None:
    text = f"""--method {name} --data {pictures} --batch-size 4 --nz 8 --generator dcgan --loader torch
        --log-every 1 --checkpoint-every 2 --threads 1 --generator-ema .5 --upsampling transposed"""
    flags = [*text.split(), *(["--autoencoder-steps", "1"] if name == "gmmn-ae" else [])]
    train.main([*flags, "--steps", "3", "--out", str(tmp_path / "whole")])
    train.main([*flags, "--steps", "2", "--out", str(tmp_path / "run")])
    train.main(["--resume", "--steps", "3", "--out", str(tmp_path / "run")])
    assert metrics(tmp_path / "run", ("step", "loss")) == metrics(tmp_path / "whole", ("step", "loss"))
    whole, resumed = (tmp_path / run / "generator.safetensors" for run in ("whole", "run"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert load_run_sampler(tmp_path / "run").prior.name == PRIORS[name]
    sample.main(["--run", str(tmp_path / "run"), "--count", "5", "--out", str(tmp_path / "five.npy")])
    assert np.load(tmp_path / "five.npy").shape == (5, 32, 32, 3)
    paths = tmp_path / "paths.png"
    sample.main(["--run", str(tmp_path / "run"), "--count", "8", "--interpolate", "--out", str(paths)])
    assert paths.exists()
    report.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "Codes of real images" in page
    assert "which is the encoder’s" in page
    Image.fromarray(np.load(pictures)[0]).resize((50, 41)).save(tmp_path / "one.png")
    encoded = ["--encode", str(tmp_path / "one.png"), "--codes", str(tmp_path / "codes.npy")]
    sample.main(["--run", str(tmp_path / "run"), *encoded, "--out", str(tmp_path / "encoded.png")])
    assert np.load(tmp_path / "codes.npy").shape == (1, 8)


AE, VAE, WAE, GMMN = (["--method", name] for name in ("ae", "vae", "wae", "gmmn-ae"))
PERCEPTUAL = [*VAE, "--reconstruction", "perceptual", "--perceptual"]
OF_ONE_FILE = (
    "--perceptual-weights: takes one file, and vgg-small+resnet18 needs 2; give 'random' if you mean it, or one"
)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([*VAE, "--prior", "uniform"], "--prior: --method vae draws codes to a gaussian, not uniform"),
        ([*AE, "--prior", "uniform"], "--prior: --method ae draws images from a Gaussian that it fits to its codes"),
        ([*AE, "--code-weight", "2"], "--code-weight: belongs to --method vae or wae, and this is --method ae"),
        ([*VAE, "--divergence", "gan"], "--divergence: belongs to --method wae, and this is --method vae"),
        ([*WAE, "--code-weight", "0"], "--code-weight: must be positive"),
        ([*WAE, "--code-critic-lr", "1e-3"], "--code-critic-lr: needs --divergence gan, and this is mmd"),
        ([*WAE, "--divergence", "js"], "--divergence: invalid choice: 'js'"),
        ([*VAE, "--encoder", "pixels"], "--encoder: 'pixels' is not known; choose one of dcgan, resnet"),
        ([*VAE, "--perceptual", "vgg19"], "--perceptual: needs --reconstruction perceptual, and this is pixels"),
        (
            [*PERCEPTUAL, "vgg-small"],
            "--perceptual-weights: vgg-small brings none; give a file from python -m engine.pretrain, or 'random'",
        ),
        (
            [*PERCEPTUAL, "vgg19"],
            "--perceptual-weights: vgg19 brings none; give a file from python -m engine.pretrain, 'imagenet', or",
        ),
        ([*PERCEPTUAL, "vgg-small+opponent"], "--perceptual-weights: vgg-small+opponent brings none; give a file"),
        ([*PERCEPTUAL, "vgg-small+resnet18"], OF_ONE_FILE),
        ([*PERCEPTUAL, "vgg-small+resnet18", "--perceptual-weights", "imagenet"], OF_ONE_FILE),
        ([*PERCEPTUAL, "vgg-small+resnet18", "--perceptual-weights", "a.safetensors"], OF_ONE_FILE),
        (
            [*PERCEPTUAL, "vgg19+torchvision:resnet18"],
            "takes one file, and vgg19+torchvision:resnet18 needs 2; give 'imagenet', or 'random' if you mean it, or "
            "one network to --perceptual",
        ),
        ([*PERCEPTUAL, "vgg20"], "--perceptual: 'vgg20' is not"),
        ([*GMMN, "--autoencoder-steps", "1"], "--autoencoder-steps: 1 leave none of 1 --steps"),
        ([*GMMN, "--code-bandwidths", "0"], "--code-bandwidths: must be positive"),
        ([*GMMN, "--mapping-lr", "-1"], "--mapping-lr: must be positive"),
        (["--encoder", "dcgan"], "--encoder: belongs to --method ae or vae or wae or gmmn-ae"),
        ([*VAE, "--extractor", "vgg19"], "--extractor: belongs to the methods that compare features"),
        ([*VAE, "--batch-size", "64"], "--batch-size: 64 is more than the"),
    ],
)
def test_bad_input_is_one_line(
    given: list[str], line: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refusal(given, pictures, tmp_path / "run", capsys)


@pytest.mark.parametrize(
    ("name", "weights", "features"),
    [
        ("opponent+pixels", None, 2 * 3 * 32 * 32),
        ("vgg-small+opponent", "FILE", None),
        ("vgg-small+resnet18", "random", None),
    ],
)
def test_several_networks_compare_images(name: str, weights: str | None, features: int | None, tmp_path: Path) -> None:
    file = str(write_weights(tmp_path / "small.safetensors")) if weights == "FILE" else weights
    extractor = make_perceptual(Config.build("digits", {"method": "vae"}), name, file)
    assert {tap.name.split(".")[0] for tap in extractor.taps} == set(name.split("+"))
    assert features is None or extractor.num_features == features


@pytest.mark.parametrize(
    ("given", "network", "usual"),
    [
        ({"method": "wae", "divergence": "gan", "code_critic_lr": 0.25}, "code_critic", 0.5),
        ({"method": "gmmn-ae", "mapping_lr": 0.25}, "mapping", 1.0),
        ({"method": "glann", "mapping_lr": 0.25}, "mapping", None),
        ({"method": "glo", "code_lr": 0.25}, "codes", None),
    ],
)
def test_a_network_s_own_learning_rate_is_its_optimizer_s(
    given: dict[str, Any], network: str, usual: float | None
) -> None:
    """`usual`: of the generator's, without the flag; None where the preset has a rate of its own."""
    rates = [small_trainer(configuration("digits", own)).method.optimizers for own in (given, without(given))]
    own, other = ({name: each.param_groups[0]["lr"] for name, each in found.items()} for found in rates)
    assert own[network] == 0.25
    assert own[network] != other[network]
    assert {**own, network: None} == {**other, network: None}
    if usual is not None:
        assert other[network] == pytest.approx(usual * other["generator"])


def without(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if not name.endswith("lr")}


def test_a_target_is_none_of_theirs(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*VAE, "--data", str(pictures), "--out", str(tmp_path / "target.safetensors")]
    code, errors = command(precompute.main, flags, capsys)
    assert (code, "--method: vae compares with no target" in errors.splitlines()[-1]) == (2, True)


@pytest.mark.parametrize("preset", ["digits", "cifar10", "celeba64"])
def test_presets_leave_steps_for_the_codes(preset: str) -> None:
    config = Config.build(preset, {"method": "gmmn-ae"})
    assert 0 < config.autoencoder.autoencoder_steps < config.training.steps


def test_another_method_of_a_run_s_configuration_needs_no_perceptual_network() -> None:
    config = Config.build("digits", {"method": "ae", "reconstruction": "perceptual", "perceptual": "vgg-small"})
    assert needs_perceptual(config)
    assert not needs_perceptual(Config.of_flat("digits", {**config.flat(), "method": "mmd"}))
