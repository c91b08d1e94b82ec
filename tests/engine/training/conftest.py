"""Fixtures: a quick run on a few real digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine import train
from pipelines import ImageLoader, open_dataset


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty real digits in a file."""
    images = next(iter(ImageLoader(open_dataset("digits"), 40, backend="torch"))).images
    path = tmp_path_factory.mktemp("data") / "digits.npy"
    np.save(path, images.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return path


@pytest.fixture(scope="module")
def flags(pictures: Path) -> list[str]:
    """A run of six quick steps."""
    text = f"""--data {pictures} --extractor vgg-small
        --weights random --batch-size 4 --steps 6 --layers 2 --nz 8 --kernels reference
        --loader torch --log-every 1 --sample-every 3 --checkpoint-every 2 --threads 1"""
    return text.split()


@pytest.fixture(scope="module")
def finished(own_cache: None, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train.main([*flags, "--out", str(out)])
    return out
