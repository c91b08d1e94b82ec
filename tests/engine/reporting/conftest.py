"""A finished run, its report, and copies of the run to be spoilt."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from engine import report, train
from engine.support.pixels import to_uint8
from pipelines import ImageLoader, open_dataset


@pytest.fixture(scope="module")
def finished(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six quick steps on sixty real digits."""
    folder = tmp_path_factory.mktemp("report")
    images = next(iter(ImageLoader(open_dataset("digits"), 60, backend="torch"))).images
    np.save(folder / "digits.npy", to_uint8(images).numpy())
    flags = """--extractor vgg-small
        --weights random --batch-size 4 --steps 6 --layers 2 --nz 8 --kernels reference --loader torch
        --log-every 1 --sample-every 2 --checkpoint-every 6 --threads 1"""
    train.main([*flags.split(), "--data", str(folder / "digits.npy"), "--out", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def page(finished: Path) -> Path:
    report.main(["--run", str(finished)])
    return finished / "report.html"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(
        shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report.html", "tensorboard"))
    )
