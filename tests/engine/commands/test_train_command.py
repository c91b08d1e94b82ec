"""The command in a report trains the same again."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from engine import train
from engine.configuration.config import Config
from engine.configuration.train_command import train_command
from engine.reporting.settings import configuration_lines


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--preset cifar10 --weights random --no-fused-ama --amp",
        "--data some/<folder>/it's --image-size 64 --chunk-size auto --memory-budget 12GiB --center-crop 100",
        "--generator-ema .5,.9,0.99 --sample-ema .9 --optimizer adamw --weight-decay 0 --lr-schedule cosine",
        "--population ema --population-decay .5",
        "--population ema --beta2 0.999 --upsampling transposed",
        "--population queue --population-images 128 --beta2 0.9 --upsampling nearest",
        "--method frechet --population ema --beta2 0.9",
        "--beta2 0.9 --upsampling nearest",
        "--amp --amp-dtype fp16 --evaluate-every 5 --evaluate-samples 9 --evaluate-extractor vgg19",
        "--extractor vgg-small+resnet18 --layers-from top",
        "--extractor vgg-small --layers 2 --layers-from top",
        "--method glo --optimizer rmsprop --beta1 0.3 --beta2 0.95",
        "--method glann --optimizer rmsprop --beta1 0.3",
        "--preset mmd-gan-rq --penalty gradient witness --penalty-weight 1 1",
        "--preset mmd-gan-rq --penalty witness --penalty-weight 2",
        "--preset wgan-gp --penalty r1",
        "--preset smmd --kernel rq --kernel-bandwidths 1",
        "--method mmd --extractor timm:vit_tiny_patch16_224 --weights imagenet --mmd-landmarks 20",
        "--lr 1e-05 --generator-ema 0.5 --averager ma --extractor vgg19+resnet18 --weights a.safetensors b.safetensors",
    ],
)
def test_the_command_trains_the_same_again(flags: str) -> None:
    def parsed(words: list[str]) -> Config:
        return train.configure(train.parser().parse_args(words))

    config = parsed(flags.split())
    words = shlex.split(train_command(config))
    assert words[:3] == ["python", "-m", "engine.train"]
    assert asdict(parsed(words[3:])) == asdict(config)


def test_a_setting_that_decides_nothing_any_more_is_left_out() -> None:
    """Of a run's config.json with a population in the place of its averager."""
    config = Config.build("digits", {"ama_lr": 0.5}).replaced({"population": "ema"})
    words = shlex.split(train_command(config))
    assert "--ama-lr" not in words
    assert train.configure(train.parser().parse_args(words[3:])).population == config.population


def test_a_configuration_with_settings_that_decide_nothing_is_read(tmp_path: Path) -> None:
    """Of an older run; its command has none of them."""
    idle = {"amp_dtype": "fp16", "evaluate_samples": 9, "layers_from": "top", "upsampling": "bilinear"}
    values = {**Config.build("digits", {"generator": "resnet", "extractor": "vgg-small"}).flat(), **idle}
    (tmp_path / "config.json").write_text(Config.of_flat("digits", values).to_json())
    config = Config.load(tmp_path / "config.json")
    assert config.flat() == values
    assert config.replaced({"steps": 7}).resumed_with({"steps": 8}).training.steps == 8
    assert train_command(config) == "python -m engine.train --preset digits --extractor vgg-small --generator resnet"


def test_a_populations_own_settings_are_usual_ones() -> None:
    config = Config.build("digits", {"population": "ema"})
    assert (config.training.beta2, config.networks.upsampling) == (0.9, "nearest")
    assert train_command(config) == "python -m engine.train --preset digits --population ema"
    lines = {line.name: line for group in configuration_lines(config).values() for line in group}
    assert lines["beta2"].default is lines["upsampling"].default is None
    told = Config.build("digits", {"population": "ema", "beta2": 0.999})
    assert "--beta2 0.999" in train_command(told)
    lines = {line.name: line for group in configuration_lines(told).values() for line in group}
    assert (lines["beta2"].value, lines["beta2"].default) == ("0.999", "0.9")
