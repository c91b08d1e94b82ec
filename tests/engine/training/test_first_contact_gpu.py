"""What only a CUDA device can show of training: the same bits twice, nothing that waits, graphs, pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.runs import same_run

from bench import data
from bench.scenario import Problem, Scenario, engine_step
from engine import train
from engine.configuration.config import Config
from engine.training.run_folder import RunFolder
from pipelines import ImageLoader, open_dataset

pytestmark = [pytest.mark.requires_gpu, pytest.mark.usefixtures("own_cache")]

PRECISIONS = {
    "bf16": ["--amp"],
    "fp16": ["--amp", "--amp-dtype", "fp16"],
    "tf32": ["--float32", "tf32"],
    "ieee": ["--float32", "ieee"],
}


def digits(out: Path, steps: int, *flags: str) -> Path:
    common = ["--device", "cuda", "--weights", "random", "--log-every", "20", "--steps", str(steps)]
    train.main([*common, *flags, "--out", str(out)])
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_seed_gives_the_same_bits(precision: str, tmp_path: Path) -> None:
    one, other = (digits(tmp_path / name, 100, *PRECISIONS[precision]) for name in ("one", "other"))
    assert same_run(one, other)
    assert not same_run(one, digits(tmp_path / "seed", 100, *PRECISIONS[precision], "--seed", "1"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_is_the_uninterrupted_one(precision: str, tmp_path: Path) -> None:
    whole = digits(tmp_path / "whole", 60, *PRECISIONS[precision])
    parts = digits(tmp_path / "parts", 40, *PRECISIONS[precision])
    train.main(["--resume", "--steps", "60", "--out", str(parts)])
    assert same_run(whole, parts)


def test_a_replayed_step_is_the_eager_one(tmp_path: Path) -> None:
    graphed = digits(tmp_path / "graphed", 200, "--amp", "--cuda-graph")
    assert same_run(graphed, digits(tmp_path / "eager", 200, "--amp", "--no-cuda-graph"))


def never_waits(step) -> None:
    """RuntimeError if one of five steps does, after five others that compile and capture."""
    for _ in range(5):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", [{}, {"amp": True}, {"amp": True, "amp_dtype": "fp16"}], ids=str)
def test_no_step_on_digits_waits(precision: dict[str, object], tmp_path: Path) -> None:
    config = Config.build("digits", {"weights": ("random",), "device": "cuda", **precision})
    never_waits(train.build(config, config, RunFolder(tmp_path / "run"), torch.device("cuda"), None).train_step)


def test_no_step_of_the_paper_s_networks_waits() -> None:
    scenario = Scenario.shapes(Problem("vgg19+resnet18", 32), "cuda")
    never_waits(engine_step(scenario.parts(64, torch.bfloat16)))


def test_jpegs_decoded_on_the_device_are_pil_s(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    folder = tmp_path / "jpegs"
    folder.mkdir()
    data.make_folder(folder, 24)
    dataset = open_dataset("celeba", folder, image_size=64)
    by_pil = [batch.images for batch in ImageLoader(dataset, 8, backend="torch")]
    data.check_same(by_pil, ImageLoader(dataset, 8, device="cuda", backend="dali"))
