"""Methods on features, from outside: each trains, resumes bit for bit, and refuses in one line what it cannot do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.marks import quick
from helpers.runs import command, metrics

from engine import train

pytestmark = pytest.mark.usefixtures("own_cache")

NAMES = ("step", "loss")
METHODS = {
    "frechet": ["--method", "frechet", "--pool", "mean"],
    "frechet-queue": ["--method", "frechet", "--population", "queue", "--population-images", "16"],
    "frechet-ema": ["--method", "frechet", "--pool", "mean+std", "--population", "ema"],
    "sinkhorn": ["--method", "sinkhorn", "--sinkhorn-images", "30"],
    "drifting": ["--method", "drifting", "--drifting-images", "30"],
    "drifting-normalised": ["--method", "drifting", "--normalise-losses", "--extractor", "vgg-small+vgg-small"],
    "gmmn": ["--method", "gmmn", "--gmmn-images", "30", "--extractor", "pixels"],
    "landmarks": ["--method", "mmd", "--mmd-landmarks", "10"],
    "gfmn-ema": ["--population", "ema"],
    "gfmn-queue": ["--population", "queue", "--population-images", "12"],
}


@pytest.mark.parametrize("name", quick(METHODS, ["frechet-queue", "sinkhorn", "landmarks", "gfmn-ema"]))
def test_resumed_equals_uninterrupted(name: str, flags: list[str], tmp_path: Path) -> None:
    given = [*flags, *METHODS[name]]
    if name == "gmmn":
        given += ["--weights", "imagenet"]  # which the pixels' are
    train.main([*given, "--out", str(tmp_path / "whole")])
    train.main([*given, "--steps", "4", "--out", str(tmp_path / "run")])
    train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "6"])
    assert metrics(tmp_path / "run", NAMES) == metrics(tmp_path / "whole", NAMES)
    whole, resumed = (tmp_path / run / "generator.safetensors" for run in ("whole", "run"))
    assert whole.read_bytes() == resumed.read_bytes()


LOWERING = [name for name in METHODS if not name.startswith(("drifting", "gfmn"))]


@pytest.mark.parametrize("name", quick(LOWERING, ["frechet", "gmmn"]))
def test_lowers_its_loss(name: str, flags: list[str], tmp_path: Path) -> None:
    """Drifting's loss says little, and gfmn's is tested elsewhere."""
    more = ["--steps", "40", "--lr", "1e-3", "--batch-size", "16", "--log-every", "1", "--checkpoint-every", "50"]
    given = [*flags, *METHODS[name], *more]
    if name == "gmmn":
        given += ["--weights", "imagenet"]
    train.main([*given, "--out", str(tmp_path / "run")])
    losses = [loss for _, loss in metrics(tmp_path / "run", NAMES)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--method", "mmd", "--mmd-landmarks", "500"], "--mmd-landmarks: must be from 1 to the number of images"),
        (["--method", "sinkhorn", "--sinkhorn-epsilon", "0"], "--sinkhorn-epsilon: must be positive"),
        (["--method", "drifting", "--drifting-temperatures", "-1"], "--drifting-temperatures: must be positive"),
        (["--method", "gmmn", "--gmmn-bandwidths", "0"], "--gmmn-bandwidths: must be positive"),
        (["--population", "queue", "--population-decay", "0.5"], "--population-decay: needs --population ema"),
        (["--population-images", "64"], "--population-images: needs --population queue"),
        (["--population", "queue", "--population-images", "3"], "--population-images: is smaller than the minibatch"),
        (["--method", "frechet", "--pool", "grid0"], "--pool: 'grid0' is not one of"),
        (["--method", "mmd", "--population", "ema"], "--population: belongs to --method gfmn or frechet"),
        (["--method", "frechet", "--sinkhorn-epsilon", "1"], "--sinkhorn-epsilon: belongs to --method sinkhorn"),
    ],
)
def test_bad_input_is_one_line(given: list[str], line: str, flags: list[str], tmp_path: Path, capsys) -> None:
    code, errors = command(train.main, [*flags, *given, "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    assert line in errors.splitlines()[-1]
    assert not (tmp_path / "run").exists()
