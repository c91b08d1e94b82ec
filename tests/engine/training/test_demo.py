"""The demo, judged by a classifier that has nothing to do with it, and the judge, judged by pictures that are known."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.digit_judge import DEVIATION_RATIO, SHARES, DigitJudge
from pipelines import ImageLoader, open_dataset

HELD_OUT = 600


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The real digits as the engine sees them, uint8 [1797, 32, 32, 3], and their classes."""
    dataset = open_dataset("digits")
    images = torch.cat([batch.images for batch in ImageLoader(dataset, 256, backend="torch")])
    assert dataset.labels is not None
    return images.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), dataset.labels


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return DigitJudge(slice(None, -HELD_OUT))


def test_held_out_real_digits_pass(judge: DigitJudge, digits) -> None:
    assert judge.judge(digits[0][-HELD_OUT:]).failures == []


def test_ten_class_means_fail(judge: DigitJudge, digits) -> None:
    images, labels = digits
    means = np.stack([images[labels == k].mean(axis=0) for k in range(10)]).round().astype(np.uint8)
    failures = judge.judge(np.repeat(means, 100, axis=0)).failures
    assert any("variety" in failure for failure in failures)


def test_blends_of_two_digits_fail(judge: DigitJudge, digits) -> None:
    images, labels = digits
    random = np.random.default_rng(0)
    one, other = random.integers(0, len(images), (2, 3000))
    differing = labels[one] != labels[other]
    blends = (images[one[differing]].astype(int) + images[other[differing]]) // 2
    failures = judge.judge(blends[:1000].astype(np.uint8)).failures
    assert any("confidence" in failure for failure in failures)


def test_one_missing_class_fails(judge: DigitJudge, digits) -> None:
    images, labels = digits
    assert any("shares" in failure for failure in judge.judge(images[labels != 3]).failures)


def train_and_draw(flags: list[str], folder: Path) -> tuple[np.ndarray, float]:
    """`python -m engine.train` from nothing: 1,000 samples, uint8 [1000, 32, 32, 3], and the seconds of training."""
    environment = {
        **os.environ,
        "GFMN_CACHE": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    begun = time.monotonic()
    train = [sys.executable, "-m", "engine.train", *flags, "--out", str(folder / "run")]
    subprocess.run(train, check=True, env=environment)
    took = time.monotonic() - begun
    sample = [sys.executable, "-m", "engine.sample", "--run", str(folder / "run"), "--count", "1000", "--seed", "1"]
    subprocess.run([*sample, "--out", str(folder / "samples.npy")], check=True, env=environment)
    return np.load(folder / "samples.npy"), took


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--amp", "--fused-ama"]], ids=["plain", "amp"])
def test_demo_draws_recognisable_digits(flags: list[str], tmp_path: Path) -> None:
    """Within four minutes on two cores."""
    samples, took = train_and_draw(flags, tmp_path)
    verdict = DigitJudge().judge(samples)
    print(f"{took:.0f} s, {verdict}")
    assert verdict.failures == []
    assert flags or verdict.chroma <= 4
    assert took < 240


@pytest.mark.slow
def test_mmd_draws_readable_digits(tmp_path: Path) -> None:
    """Within five minutes on two cores: at least 60% are recognised with confidence, all ten digits among them."""
    samples, took = train_and_draw(["--method", "mmd"], tmp_path)
    verdict = DigitJudge().judge(samples)
    print(f"{took:.0f} s, {verdict}")
    assert verdict.confident >= 0.6
    assert verdict.shares.min() >= SHARES[0]
    assert verdict.deviation_ratios.min() >= DEVIATION_RATIO
    assert took < 300
