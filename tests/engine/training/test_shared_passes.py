"""What ranks share beside steps: the pass over the real images, and evaluation. As one process has it, to rounding."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import pass_worker
from helpers.jobs import ends, start_job
from helpers.judging import write_weights
from oracle import relative_error

from engine import precompute
from engine.comparison.distances.moments import Moments
from engine.comparison.reference import statistics_pass
from engine.comparison.reference.target import MomentsKind
from engine.configuration.build import make_reference
from engine.configuration.config import Config
from engine.representation.pretraining import pretrain
from engine.support.errors import InputError
from engine.training.held_out import judged
from engine.training.ranks import ALONE, Ranks
from engine.training.run_folder import RunFolder
from pipelines import ImageLoader, open_dataset, read_pixels

SIZE = 3
FLAGS = [
    *("--weights", "random", "--layers", "2", "--batch-size", "4", "--kernels", "reference", "--loader", "torch"),
    *("--threads", "1", "--device", "cpu", "--nz", "4", "--steps", "1"),
]
SLOWLY = """
import sys, time
import engine.comparison.reference.statistics_pass
from engine.configuration.command import run_command
from engine.representation.feature_pass import FeaturePass
engine.comparison.reference.statistics_pass.SAVE_EVERY = 0
collect = FeaturePass.collect
def slowly(*arguments):
    time.sleep(0.2)
    collect(*arguments)
FeaturePass.collect = slowly
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits in files, 61 and 2 of them, and two judges."""
    folder = tmp_path_factory.mktemp("shared")
    pixels = read_pixels(open_dataset("digits"), backend="torch")[:61].permute(0, 2, 3, 1).numpy()
    for count in (61, 2):
        np.save(folder / f"{count}.npy", pixels[:count])
    judge = pretrain("vgg-small", open_dataset("digits"), task="classify", image_size=32, steps=2, seed=9)
    judge.save(folder / "judge.safetensors")
    write_weights(folder / "encoder.safetensors", "dcgan-encoder")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What every rank has at the end."""
    cache = tmp_path_factory.mktemp("cache")
    for status, errors in ends(start_job(SIZE, [pass_worker.__file__, str(folder)], GFMN_CACHE=str(cache))):
        assert status == 0, errors
    left = [path.name for path in (cache / "targets").iterdir()]
    assert len(left) == 4
    assert all(name.endswith(".safetensors") for name in left)
    return [torch.load(folder / f"{SIZE}.{rank}.pt") for rank in range(SIZE)]


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GFMN_CACHE", str(tmp_path_factory.mktemp("alone")))
        return pass_worker.run(folder, ALONE)


def test_all_ranks_get_the_reference_of_one(found, alone) -> None:
    first, *others = (rank["references"] for rank in found)
    assert first.keys() == alone["references"].keys()
    for name, expected in alone["references"].items():
        assert relative_error(first[name], expected) <= 1e-12, name
        for other in others:
            assert torch.equal(other[name], first[name]), name


@pytest.mark.parametrize("batch_statistics", [False, True], ids=["running", "batch"])
def test_evaluations_are_those_of_one(batch_statistics: bool, found, alone) -> None:
    first, *others = (rank["evaluations"][batch_statistics] for rank in found)
    for found_together, found_alone in zip(first, alone["evaluations"][batch_statistics], strict=True):
        of_all = zip(judged(found_together), judged(found_alone), ("vgg-small", "dcgan-encoder"), strict=True)
        for ours, expected, network in of_all:
            assert ours.pop("network") == expected["network"] == network
            assert (ours["samples"], ours["real"]) == (pass_worker.SAMPLES, 61)
            # So few images are all in every subset of KID's, whose deviation is rounding alone: below 1e-6.
            assert ours == pytest.approx({name: expected[name] for name in ours}, rel=1e-4, abs=1e-7)
    assert "three_sample_p" in first[1]
    assert all(evaluation is None for other in others for evaluation in other)


def test_words_of_the_first_reach_all(found) -> None:
    assert all(rank["words"] == [b"one 0", b"another 0", b" 0"] for rank in found)


def command(module: str, argv: Sequence[object]) -> list[str]:
    return ["-c", f"{SLOWLY}\nfrom {module} import main\nrun_command(main)", *map(str, argv)]


def until(files: Sequence[Path], job: Sequence[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not all(file.exists() for file in files):
        assert all(process.poll() is None for process in job), ends(job)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_training_killed_in_the_pass_resumes_it_on_every_rank(folder: Path, tmp_path: Path, monkeypatch) -> None:
    argv = [*FLAGS, "--data", folder / "61.npy"]
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "alone"))
    precompute.main([*map(str, argv), "--out", str(tmp_path / "one.safetensors")])
    cache = tmp_path / "cache"
    judge = ["--evaluate-extractor", "vgg-small", "--evaluate-weights", folder / "judge.safetensors"]
    run = [*argv, "--out", tmp_path / "run", "--evaluate-every", 1, "--evaluate-samples", 12, *judge]
    (target,) = (tmp_path / "alone/targets").iterdir()  # its name is of what it is made of
    partials = [cache / f"targets/{target.name}{rank}.partial" for rank in ("", ".1")]
    job = start_job(2, command("engine.train", run), GFMN_CACHE=str(cache))
    until(partials, job)
    for process in job:
        process.kill()
    ends(job)
    assert all(partial.exists() for partial in partials)
    assert not (cache / "targets" / target.name).exists()
    again = ends(start_job(2, ["-m", "engine.train", *map(str, run)], GFMN_CACHE=str(cache)))
    for status, errors in again:
        assert status == 0, errors
        assert "resuming after" in errors
    assert [path.name for path in (cache / "targets").iterdir()] == [target.name]
    made, expected = Moments.load(RunFolder(tmp_path / "run").target), Moments.load(target)
    assert (made.count, made.fingerprint) == (61, expected.fingerprint)
    np.testing.assert_allclose(made.mean.numpy(), expected.mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(made.m2.numpy(), expected.m2.numpy(), rtol=1e-5, atol=1e-12)
    (step,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(step)["evaluation"].items() >= {"samples": 12, "real": 61}.items()
    assert (tmp_path / "run/generator_best.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["engine.train", "engine.precompute"])
def test_a_signal_to_one_rank_ends_all_with_its_status(module: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    job = start_job(2, command(module, [*FLAGS, "--data", folder / "61.npy", "--out", out]), GFMN_CACHE=str(tmp_path))
    beside = out if module == "engine.precompute" else next(iter_targets(tmp_path, job))
    partials = [beside.with_name(f"{beside.name}{rank}.partial") for rank in ("", ".1")]
    until(partials, job)
    job[1].send_signal(signal.SIGTERM)
    found = ends(job, within=60)
    assert [status for status, _ in found] == [128 + signal.SIGTERM] * 2
    said = [line for _, errors in found for line in errors.splitlines() if "the same command resumes there" in line]
    assert len(said) == 1
    assert "Traceback" not in found[0][1] + found[1][1]
    assert all(partial.exists() for partial in partials)


def iter_targets(cache: Path, job: Sequence[subprocess.Popen[str]]):
    """The file that a pass is going to make, once its state is there."""
    while True:
        for partial in (cache / "targets").glob("*.safetensors.partial"):
            yield partial.with_suffix("")
        assert all(process.poll() is None for process in job), ends(job)
        time.sleep(0.02)


class Two(Ranks):
    """Alone, and told of another rank with something else."""

    def __init__(self, **other: str):
        super().__init__()
        self.other = other

    def meet(self, name, message, give_up=lambda: False):
        return [message, {**message, **self.other}] if name == "features" else [message]


def test_ranks_that_see_other_images_are_refused(tiny_extractor, folder: Path) -> None:
    dataset = open_dataset("images", folder / "2.npy", image_size=8)
    with pytest.raises(InputError, match="process 1 has other features than process 0: the number of images"):
        statistics_pass.compute_reference(
            MomentsKind(), tiny_extractor, ImageLoader(dataset, 2), kernels="reference", ranks=Two(data_count="3")
        )


def test_ranks_with_other_networks_are_refused(tiny_extractor, folder: Path) -> None:
    """Whatever is known of the real images: rank 0 may have it from the cache."""
    dataset, config = open_dataset("images", folder / "2.npy", image_size=8), Config.build("digits", {"method": "mmd"})
    with pytest.raises(InputError, match="process 1 has other features than process 0: the extractor's weights"):
        make_reference(config, tiny_extractor, dataset, None, ranks=Two(extractor_weights="other"))


def test_evaluate_says_that_it_runs_in_one_process(folder: Path) -> None:
    found = ends(start_job(2, ["-m", "engine.evaluate", "--images", str(folder), "--device", "cpu"]))
    assert [status for status, _ in found] == [2, 2]
    (line,) = [line for _, errors in found for line in errors.splitlines()]
    assert line == "error: engine.evaluate runs in one process; start it without torchrun"
