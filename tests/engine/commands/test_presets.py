"""Which preset a command starts from, and that a run of one's own photographs trains, samples and resumes with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import sample, train
from engine.configuration.config import Config
from engine.configuration.presets import preset_for
from engine.generation.saved import load_sampler


@pytest.mark.parametrize(
    ("given", "preset"),
    [
        ({}, "digits"),
        ({"steps": 5}, "digits"),
        ({"data": "photos/"}, "photos"),
        ({"data": "photos/", "dataset": "images"}, "photos"),
        ({"data": "cifar/", "dataset": "cifar10"}, "digits"),
        ({"dataset": "stl10"}, "digits"),
    ],
    ids=str,
)
def test_the_preset_of_who_names_none(given: dict[str, str], preset: str) -> None:
    assert preset_for(given) == preset
    assert Config.build(None, given).preset == preset


def test_the_extractor_of_photographs_is_one_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config.build("photos", {"data": "photos/"}).networks.extractor == "efficientnet-lite0"
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else found(name))
    small = Config.build("photos", {"data": "photos/"}).networks
    assert (small.extractor, small.weights) == ("vgg-small", ("pretrain",))
    assert Config.build("photos", {"data": "photos/", "extractor": "vgg19"}).networks.extractor == "vgg19"


def test_photographs_train_with_the_defaults(tmp_path: Path) -> None:
    photographs, run = tmp_path / "photographs", tmp_path / "run"
    photographs.mkdir()
    random = np.random.default_rng(0)
    for number in range(6):
        picture = Image.fromarray(random.integers(256, size=(70, 80, 3), dtype=np.uint8))
        picture.save(photographs / f"{number}.jpg")
    flags = ["--batch-size", "2", "--kernels", "reference"]
    arguments = ["--data", str(photographs), "--out", str(run), "--steps", "1", *flags]
    train.main(arguments)
    generator = load_sampler(run / "generator.safetensors").generator
    assert (generator.spec.image_size, generator.spec.upsampling) == (32, "nearest")
    assert not any(isinstance(module, torch.nn.ConvTranspose2d) for module in generator.modules())
    train.main(["--resume", "--out", str(run), "--steps", "2"])
    out = tmp_path / "samples.npy"
    sample.main(["--run", str(run), "--count", "3", "--out", str(out)])
    assert np.load(out).shape == (3, 32, 32, 3)
