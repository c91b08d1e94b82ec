"""What a GPU would find, as far as a CPU can show it: cuDNN's flags, an old driver, how DALI would decode there."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import train
from engine.configuration.inputs import choose_device
from engine.methods.matching import Matching
from engine.representation.extractor import feature_fingerprint
from engine.representation.pretraining import pretrain, tasks
from engine.training.precision import repeatable
from pipelines import open_dataset

CUDNN = torch.backends.cudnn


def flags() -> tuple[bool, bool, bool]:
    return CUDNN.enabled, CUDNN.deterministic, CUDNN.benchmark


def test_repeatable_leaves_cudnn_on_and_tf32_as_it_was() -> None:
    for allowed in (True, False):
        with CUDNN.flags(enabled=True, allow_tf32=allowed):
            with repeatable():
                assert flags() == (True, True, False)
                assert CUDNN.allow_tf32 is allowed
            assert CUDNN.allow_tf32 is allowed


def test_pretraining_and_training_are_repeatable(flags_of_a_run: list[tuple[bool, bool, bool]]) -> None:
    assert len(flags_of_a_run) == 4
    assert set(flags_of_a_run) == {(True, True, False)}


@pytest.fixture
def flags_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool, bool]]:
    """cuDNN's flags in two steps of pretraining and two of training."""
    seen = []
    loss, step = tasks.Rotate.loss, Matching.step

    def watched_loss(*arguments: object) -> torch.Tensor:
        seen.append(flags())
        return loss(*arguments)

    def watched_step(*arguments: object) -> object:
        seen.append(flags())
        return step(*arguments)

    monkeypatch.setattr(tasks.Rotate, "loss", watched_loss)
    monkeypatch.setattr(Matching, "step", watched_step)
    pictures = tmp_path / "pictures.npy"
    np.save(pictures, np.random.default_rng(0).integers(256, size=(40, 32, 32, 3), dtype=np.uint8))
    pretrain("vgg-small", open_dataset("images", pictures), task="rotate", steps=2, batch_size=8)
    arguments = ["--data", str(pictures), "--extractor", "vgg-small", "--weights", "random", "--steps", "2"]
    train.main([*arguments, "--batch-size", "4", "--no-fused-ama", "--device", "cpu", "--out", str(tmp_path / "run")])
    return seen


@pytest.mark.parametrize(
    ("device", "float32", "amp_dtype", "precision"),
    [
        ("cpu", "tf32", None, "float32"),
        ("cuda", "tf32", None, "tf32"),
        ("cuda", "ieee", None, "float32"),
        ("cuda", "tf32", torch.bfloat16, "bfloat16"),
    ],
)
def test_a_target_says_what_float32_is_on_the_device(device: str, float32: str, amp_dtype, precision: str) -> None:
    extractor = SimpleNamespace(device=torch.device(device), dtype=torch.float32, fingerprint={})
    with CUDNN.flags(enabled=True):
        choose_device("cpu", float32=float32)
        assert feature_fingerprint(extractor, amp_dtype) == {"precision": precision}


@pytest.mark.parametrize(("there", "visible"), [(True, None), (True, "0"), (False, None), (True, ""), (True, "-1")])
def test_a_gpu_that_cannot_be_used_is_said(there: bool, visible, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    """Unless it was hidden on purpose."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([path / "nvidia0"] if there else []))
    assert choose_device("auto").type == "cpu"
    assert ("nvidia0" in caplog.text) == (there and visible in (None, "0"))
    caplog.clear()
    choose_device("cpu")
    assert not caplog.text


def test_jpegs_on_a_gpu_are_upsampled_as_on_a_cpu_and_by_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dali_files = pytest.importorskip("pipelines.loading.dali_files")
    decode, options = dali_files.fn.decoders.image, {}

    def watched(encoded: object, **given: object) -> object:
        options.update(given)
        return decode(encoded, **given)

    monkeypatch.setattr(dali_files.fn.decoders, "image", watched)
    for decoder in ("cpu", "mixed"):
        options.clear()
        # Defined, which checks the arguments; only building it needs a driver.
        dali_files.file_pipeline(lambda: None, 32, None, decoder, batch_size=2, num_threads=1, device_id=0)
        assert options["device"] == decoder
        assert options.get("jpeg_fancy_upsampling", False) == (decoder == "mixed")
        assert options.get("hw_decoder_load", 0.0) == 0.0
    assert "jpeg_fancy_upsampling" in inspect.getdoc(decode)
