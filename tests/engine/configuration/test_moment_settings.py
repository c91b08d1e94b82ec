"""Commands of denoising feature matching and of learned moments: what they refuse, their networks, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.runs import command, metrics

from engine import train
from engine.configuration.build import make_generator, make_networks
from engine.configuration.config import Config
from engine.configuration.modelling import predict
from engine.representation.critics.denoiser import Denoiser
from engine.support.errors import InputError

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"method": "molm", "penalty": ["r1"]}, "penalty", "this is --method molm"),
    ({"method": "molm", "critic_steps": 2}, "critic_steps", "this is --method molm"),
    ({"method": "molm", "critic_norm": "batch"}, "critic_norm", "batch mixes images"),
    ({"method": "molm", "critic": "autoencoder"}, "critic", "that of --method began"),
    ({"method": "molm", "denoise_weight": 0.1}, "denoise_weight", "belongs to --method dfm"),
    ({"method": "dfm", "critic": "autoencoder"}, "critic", "that of --method began"),
    ({"method": "dfm", "critic_outputs": 2}, "critic_outputs", "needs 1, not 2"),
    ({"method": "dfm", "penalty": ["gradient"]}, "critic_norm", "each image's own derivative"),
    ({"method": "dfm", "denoise_weight": 0, "adversarial_weight": 0}, "adversarial_weight", "nothing to learn"),
    ({"method": "dfm", "denoise_weight": 0, "denoiser_lr": 0.1}, "denoiser_lr", "needs a --denoise-weight above 0"),
    ({"method": "gan", "moment_every": 3}, "moment_every", "belongs to --method molm"),
    ({"preset": "dfm", "method": "molm"}, "method", "one of --method dfm"),
]


@pytest.mark.parametrize(("given", "argument", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals(given: dict[str, Any], argument: str, words: str) -> None:
    settings = {name: value for name, value in given.items() if name != "preset"}
    with pytest.raises(InputError, match=words) as error:
        Config.build(given.get("preset", "digits"), settings)
    assert error.value.argument == argument
    assert "\n" not in str(error.value)


def test_the_command_names_the_flag(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--method", "molm", "--critic-norm", "batch", "--out", str(tmp_path / "run")]
    code, message = command(train.main, flags, capsys)
    assert code == 2
    assert message.startswith("error: --critic-norm")
    assert message.count("\n") == 1


@pytest.mark.parametrize(("critic", "side", "width"), [("dcgan", 32, 4096), ("resnet", 64, 1024)])
def test_the_denoiser_is_as_wide_as_features(critic: str, side: int, width: int) -> None:
    given = {"critic": critic, "image_size": side, "denoiser_width": 7, "denoiser_layers": 2}
    config = Config.build("dfm", given)
    networks = make_networks(config)
    denoiser = networks["denoiser"]
    assert isinstance(denoiser, Denoiser)
    assert [tuple(weight.shape) for weight in denoiser.parameters()] == [(7, width), (7,), (7,), (width, 7), (width,)]
    assert networks["critic"].training
    assert denoiser.training
    others = make_networks(Config.build("dfm", {**given, "seed": 1}))
    counts = [int(value) for name, value in others["critic"].state_dict().items() if name.endswith("tracked")]
    assert set(counts) <= {0}, "no image has changed BatchNorm's statistics"


def test_published_recipes() -> None:
    dfm, molm = Config.build("dfm", {"data": "photos"}), Config.build("molm", {"data": "photos"})
    assert (dfm.training.lr, dfm.training.beta1, dfm.denoising.denoiser_layers, dfm.denoising.denoiser_width) == (
        1e-4, 0.5, 10, 1024,
    )  # fmt: skip
    assert dfm.needs.captured
    assert not Config.build("dfm", {"critic_warmup": 2}).needs.captured
    assert not molm.needs.captured


@pytest.mark.parametrize("method", ["dfm", "molm"])
def test_memory_of_a_step_is_modelled(method: str) -> None:
    """The moment network's steps are alike, however many."""
    config = Config.build(method, {"batch_size": 4, "generator": "dcgan", "critic": "dcgan"})
    generator, networks = make_generator(config), make_networks(config)
    found = predict(config, generator, None, networks=networks)
    assert found.peak > found.between_steps > found.weights


FLAGS = """--batch-size 3 --nz 4 --generator dcgan --critic dcgan --generator-ema 0.9 --kernels reference --device cpu
    --threads 1 --log-every 1 --sample-every 100 --checkpoint-every 1 --keep-checkpoints 9 --steps 5"""
OWN = {
    "dfm": "--critic-steps 1 --denoiser-width 8 --denoiser-layers 3",
    "molm": "--moment-every 2 --moment-steps 2 --moment-images 4",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", OWN)
def test_resumed_runs_are_uninterrupted_ones(method: str, own_cache: None, tmp_path: Path) -> None:
    flags = ["--method", method, *FLAGS.split(), *OWN[method].split()]
    whole, run = tmp_path / "whole", tmp_path / "run"
    train.main([*flags, "--out", str(whole)])
    train.main([*flags, "--steps", "3", "--out", str(run)])
    train.main(["--resume", "--steps", "5", "--out", str(run)])
    files = [folder / "checkpoints" / "step_00000005.safetensors" for folder in (whole, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    names = ("step", "loss", "critic_loss")
    assert metrics(run, names) == metrics(whole, names)
