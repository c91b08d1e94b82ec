"""What the engine writes and reads may lie at any path that a file system allows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from engine.configuration.config import Config
from engine.representation.weights import read_state_dict
from engine.support.files import read_safetensors, save_safetensors

NAMES = [b"\xff", b"new\nline", b"\x1b[31m", "ü€".encode(), b" \" ' $HOME ` \\"]


@pytest.fixture(params=NAMES, ids=repr)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / os.fsdecode(request.param)
    path.mkdir()
    return path


def test_tensors(folder: Path) -> None:
    path = folder / "x.safetensors"
    save_safetensors(path, {"x": torch.arange(3)}, {"format": "kind"})
    tensors, metadata = read_safetensors(path, "kind", "a file of this kind")
    assert tensors["x"].tolist() == [0, 1, 2]
    assert metadata == {"format": "kind"}


def test_weights(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(save({"w": torch.ones(2)}))
    assert read_state_dict(path)["w"].tolist() == [1, 1]
    torch.save({"w": torch.ones(2)}, folder / "weights.pt")
    assert read_state_dict(folder / "weights.pt")["w"].tolist() == [1, 1]


def test_a_configuration_remembers_its_data(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    config = Config.build("digits", {"data": str(folder)})
    (folder / "config.json").write_bytes(config.to_json().encode())
    assert Config.load(folder / "config.json").data.data == str(folder)
