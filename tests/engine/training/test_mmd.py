"""`--method mmd` from outside: it trains, resumes bit for bit, and everything around it knows no method."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.marks import quick
from helpers.runs import command, metrics
from safetensors.torch import load_file

from engine import precompute, sample, train
from engine.comparison.distances import landmarks
from engine.configuration.inputs import load_run_sampler

pytestmark = pytest.mark.usefixtures("own_cache")

MMD = ["--method", "mmd", "--mmd-images", "30"]
KERNELS = ("gaussian", "rational-quadratic", "imq", "polynomial", "linear", "energy")
NAMES = ("step", "loss")


@pytest.fixture(scope="module")
def run(own_cache: None, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mmd"
    train.main([*flags, *MMD, "--out", str(out)])
    return out


def test_run_folder_is_like_any_other(run: Path, finished: Path) -> None:
    assert {path.name for path in run.iterdir()} == {path.name for path in finished.iterdir()}
    assert set(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])) == {
        "step",
        "loss",
        "images_per_second",
        "peak_memory_bytes",
    }


def test_chunks_and_stages_change_nothing_but_rounding(run: Path, flags: list[str], tmp_path: Path) -> None:
    more = ["--chunk-size", "1", "--recompute", "stages", "--recompute-generator"]
    train.main([*flags, *MMD, *more, "--out", str(tmp_path / "chunks")])
    np.testing.assert_allclose(metrics(tmp_path / "chunks", NAMES), metrics(run, NAMES), rtol=1e-3)


def test_resumed_equals_uninterrupted(run: Path, flags: list[str], tmp_path: Path) -> None:
    train.main([*flags, *MMD, "--steps", "4", "--out", str(tmp_path / "run")])
    train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "6"])
    assert metrics(tmp_path / "run", NAMES) == metrics(run, NAMES)
    assert (tmp_path / "run/generator.safetensors").read_bytes() == (run / "generator.safetensors").read_bytes()


@pytest.mark.parametrize("kernel", quick(KERNELS, ["energy"]))
def test_every_kernel_lowers_its_loss(kernel: str, flags: list[str], tmp_path: Path) -> None:
    more = ["--mmd-kernel", kernel, "--steps", "40", "--lr", "1e-3", "--batch-size", "16", "--log-every", "1"]
    more += ["--sample-every", "50", "--checkpoint-every", "50"]
    train.main([*flags, *MMD, *more, "--out", str(tmp_path / "run")])
    losses = [loss for _, loss in metrics(tmp_path / "run", NAMES)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_precomputed_bank_is_the_cached_one(run: Path, flags: list[str], tmp_path: Path) -> None:
    target = tmp_path / "bank.safetensors"
    precompute.main([*flags, *MMD, "--out", str(target)])
    bank = load_file(target)
    assert bank["features"].shape[0] == 30
    assert bank["indices"].tolist() == [n * 40 // 30 for n in range(30)]
    train.main([*flags, *MMD, "--target", str(target), "--out", str(tmp_path / "run")])
    assert metrics(tmp_path / "run", NAMES) == metrics(run, NAMES)


LANDMARKS = ["--method", "mmd", "--mmd-landmarks", "8", "--mmd-kernel", "energy"]


def test_landmarks_are_found_once(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    """Kept by the run and in the cache, and `engine.precompute` writes the same."""
    run, target = tmp_path / "run", tmp_path / "landmarks.safetensors"
    train.main([*flags, *LANDMARKS, "--steps", "4", "--out", str(run)])
    precompute.main([*flags, *LANDMARKS, "--out", str(target)])
    assert load_file(target)["points.0"].shape[0] == 9
    for name, tensor in load_file(run / "target.safetensors").items():
        assert torch.equal(load_file(target)[name], tensor)

    def choose_landmarks(*_: object, **__: object) -> None:
        raise AssertionError("landmarks are chosen again")

    monkeypatch.setattr(landmarks, "choose_landmarks", choose_landmarks)
    train.main(["--resume", "--out", str(run), "--steps", "6"])
    train.main([*flags, *LANDMARKS, "--out", str(tmp_path / "cached")])
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "empty"))
    train.main([*flags, *LANDMARKS, "--target", str(target), "--out", str(tmp_path / "given")])
    assert metrics(run, NAMES) == metrics(tmp_path / "cached", NAMES) == metrics(tmp_path / "given", NAMES)


def test_uniform_prior_is_kept_with_the_generator(flags: list[str], tmp_path: Path) -> None:
    """Whatever draws from a run later draws from its prior, and knows it from the file alone."""
    out = tmp_path / "run"
    train.main([*flags, "--prior", "uniform", "--steps", "2", "--out", str(out)])
    sampler = load_run_sampler(out)
    assert sampler.prior.name == "uniform"
    z = sampler.prior.draw(500, 0)
    assert float(z.abs().max()) <= 1
    assert float(z.var()) == pytest.approx(1 / 3, abs=0.02)
    sample.main(["--run", str(out), "--count", "3", "--out", str(tmp_path / "samples.npy")])
    expected = sampler.images(torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    pixels = expected.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.load(tmp_path / "samples.npy"), pixels)


def test_same_seed_same_bits(run: Path, flags: list[str], tmp_path: Path) -> None:
    train.main([*flags, *MMD, "--out", str(tmp_path / "again")])
    train.main([*flags, *MMD, "--seed", "1", "--out", str(tmp_path / "other")])
    assert metrics(tmp_path / "again", NAMES) == metrics(run, NAMES)
    assert metrics(tmp_path / "other", NAMES) != metrics(run, NAMES)
    assert not same_run_of(tmp_path / "other", run)


def same_run_of(one: Path, other: Path) -> bool:
    return (one / "generator.safetensors").read_bytes() == (other / "generator.safetensors").read_bytes()


def test_real_images_that_are_all_the_same_are_refused(flags: list[str], tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "same.npy", np.full((40, 32, 32, 3), 7, dtype=np.uint8))
    argv = [*flags, *MMD, "--data", str(tmp_path / "same.npy"), "--out", str(tmp_path / "run")]
    code, errors = command(train.main, argv, capsys)
    assert code == 2
    assert "real images that differ" in errors.splitlines()[-1]
