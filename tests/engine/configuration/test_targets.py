"""A target and a run of two devices: what may differ, and the line that says what makes them fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import command
from PIL import Image

from engine import precompute, train
from engine.comparison.distances.moments import Moments
from engine.comparison.reference import statistics_pass
from engine.configuration.config import Config
from engine.configuration.targets import check_target
from engine.support.errors import InputError
from engine.training.run_folder import RunFolder
from pipelines import ImageLoader

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# The target's decoder and precision, the run's, the device; what the line ends with.
FILES = [
    ("pil float32", "dali-cuda float32", CUDA, "; with --loader torch they agree"),
    ("pil float32", "dali-cuda tf32", CUDA, "; with --float32 ieee --loader torch they agree"),
    ("dali-cuda tf32", "pil tf32", CUDA, "; with --loader dali they agree"),
    ("dali-cpu float32", "pil float32", CPU, "; with --loader dali they agree"),
    ("dali-cpu float32", "dali-cuda float32", CUDA, "or give both commands --loader torch"),
    ("dali-cuda bfloat16", "dali-cpu bfloat16", CPU, "or give both commands --loader torch"),
    ("none float32", "none tf32", CUDA, "; with --float32 ieee they agree"),
    ("none tf32", "none float32", CUDA, "; with --float32 tf32 they agree"),
    ("none tf32", "none float32", CPU, "; a CPU has no TF32: train on a GPU, or make the target with --float32 ieee"),
    ("none bfloat16", "none tf32", CUDA, "; with --amp --amp-dtype bf16 they agree"),
    ("none float16", "none bfloat16", CUDA, "; with --amp --amp-dtype fp16 they agree"),
    ("none float32", "none bfloat16", CUDA, "; with --no-amp --float32 ieee they agree"),
    ("none float32", "none bfloat16", CPU, "; with --no-amp they agree"),
]
RESUMED = [
    ("pil float32", "dali-cuda tf32", CUDA, "; with --float32 ieee --loader torch they agree"),
    ("dali-cpu float32", "dali-cuda float32", CUDA, "only DALI on a CPU makes the same: resume it there"),
    ("dali-cuda bfloat16", "pil bfloat16", CPU, "only DALI on a GPU makes the same: resume it there"),
    ("none tf32", "none float32", CPU, "; a CPU has no TF32: resume it on a GPU"),
]


def entries(text: str, **others: str) -> dict[str, str]:
    decoder, precision = text.split()
    return {"data_decoder": decoder, "precision": precision, **others}


@pytest.mark.parametrize(
    ("was", "now", "device", "ending", "resumed"),
    [*((*row, False) for row in FILES), *((*row, True) for row in RESUMED)],
)
def test_the_line_says_what_makes_them_fit(was: str, now: str, device: torch.device, ending: str, resumed: bool):
    with pytest.raises(InputError) as error:
        check_target(Config(), entries(now), entries(was), Path("t.safetensors"), device, resumed=resumed)
    message = str(error.value)
    assert message.startswith("t.safetensors: was made from something else: ")
    for old, new in zip(was.split(), now.split(), strict=True):
        assert (f"was {old}, is {new}" in message) == (old != new)
    assert message.endswith(ending)
    assert "\n" not in message


def test_no_advice_where_something_else_differs() -> None:
    was = entries("pil float32", extractor_weights="0" * 16)
    now = entries("dali-cpu float32", extractor_weights="1" * 16)
    config = Config.build("digits", {"weights": ("random",)})
    with pytest.raises(InputError, match="extractor's weights changed") as error:
        check_target(config, now, was, "target", CPU)
    assert "--" not in error.value.message
    now["data_decoder"] = "pil"
    for pretrained in (False, True):
        with pytest.raises(InputError) as error:
            check_target(Config() if pretrained else config, now, was, "target", CPU)
        assert ("the same files of --weights" in error.value.message) == pretrained
    check_target(config, was, was, "target", CPU)
    check_target(config, was, {}, "target", CPU)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(random.integers(0, 256, (40, 41, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def argv(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    flags = "--weights random --layers 1 --batch-size 4 --nz 8 --kernels reference --loader torch --threads 1"
    return [*flags.split(), "--device", "cpu", "--data", str(photos)]


def decoded_on_gpu(patch: pytest.MonkeyPatch) -> None:
    fingerprint = ImageLoader.fingerprint
    patch.setattr(ImageLoader, "fingerprint", lambda loader: fingerprint(loader) | {"decoder": "dali-cuda"})


def test_a_target_of_a_gpu_is_refused_on_a_cpu(argv, tmp_path: Path, monkeypatch, capsys) -> None:
    target, run = tmp_path / "target.safetensors", tmp_path / "run"
    with monkeypatch.context() as patch:
        features = statistics_pass.feature_fingerprint
        decoded_on_gpu(patch)
        patch.setattr(statistics_pass, "feature_fingerprint", lambda *given: features(*given) | {"precision": "tf32"})
        precompute.main([*argv, "--out", str(target)])
    assert Moments.load(target).fingerprint["data_decoder"] == "dali-cuda"
    code, errors = command(train.main, [*argv, "--target", str(target), "--steps", "1", "--out", str(run)], capsys)
    last = errors.splitlines()[-1]
    assert code == 2
    assert last.startswith(f"error: {target}: ")
    for part in ("decoder of the images was dali-cuda, is pil", "precision was tf32, is float32", "a CPU has no TF32"):
        assert part in last
    assert last.endswith("; make the target on the device that trains, or give both commands --loader torch")
    assert not (run / "config.json").exists()


@pytest.mark.parametrize("kept", [True, False], ids=["target kept", "target lost"])
def test_a_run_decoded_elsewhere_resumes_with_its_own_target(
    kept: bool, argv, tmp_path: Path, monkeypatch, capsys
) -> None:
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        decoded_on_gpu(patch)
        train.main([*argv, "--steps", "1", "--out", str(run.path)])
    resume = ["--resume", "--out", str(run.path), "--steps", "2"]
    if kept:
        train.main(resume)
        assert run.newest_checkpoint().step == 2
        assert run.newest_checkpoint().fingerprint["data_decoder"] == "dali-cuda"
        return
    run.target.unlink()
    code, errors = command(train.main, resume, capsys)
    assert code == 2
    assert errors.splitlines()[-1].endswith("only DALI on a GPU makes the same: resume it there")
