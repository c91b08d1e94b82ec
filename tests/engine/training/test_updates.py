"""Runs with another optimizer, schedules, clipping and several averages: what they write, and how they resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import command, same_run
from safetensors.torch import load_file

from engine import train
from engine.configuration.config import Config
from engine.training.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("own_cache")

ALL = [
    *("--optimizer", "adamw", "--weight-decay", "0.1", "--clip-grad", "0.1"),
    *("--lr-schedule", "cosine", "--warmup-steps", "2", "--lr-final", "1e-5"),
    *("--generator-ema", "0.5,0.9", "--sample-ema", "0.9"),
]
CHANGES = ["--lr-schedule=cosine", "--clip-grad=1", "--optimizer=adamw", "--generator-ema=.5,.9"]


def without_last(run: Path, parts: Path) -> Path:
    """What a kill before the last checkpoint leaves: the steps after the one before are taken again."""
    shutil.copytree(run, parts)
    (parts / "checkpoints" / "step_00000006.safetensors").unlink()
    return parts


def last(run: Path) -> Path:
    return run / "checkpoints" / "step_00000006.safetensors"


@pytest.fixture(scope="module")
def whole(own_cache: None, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("updates") / "whole"
    train.main([*flags, *ALL, "--out", str(out)])
    return out


def test_resumed_equals_uninterrupted(whole: Path, tmp_path: Path) -> None:
    parts = without_last(whole, tmp_path / "parts")
    train.main(["--resume", "--out", str(parts)])
    assert same_run(whole, parts)
    assert last(whole).read_bytes() == last(parts).read_bytes()


def test_fp16_with_clipping_resumes(flags: list[str], tmp_path: Path) -> None:
    argv = [*flags, "--amp", "--amp-dtype", "fp16", "--clip-grad", "0.1", "--lr-schedule", "linear"]
    train.main([*argv, "--out", str(tmp_path / "whole")])
    parts = without_last(tmp_path / "whole", tmp_path / "parts")
    train.main(["--resume", "--out", str(parts)])
    assert same_run(tmp_path / "whole", parts)
    assert last(tmp_path / "whole").read_bytes() == last(parts).read_bytes()


def test_all_averages_are_kept_and_one_is_sampled(whole: Path) -> None:
    checkpoint, generator = load_file(last(whole)), load_file(whole / "generator.safetensors")
    names = {name.split("/")[0] for name in checkpoint if name.startswith("ema")}
    assert names == {"ema.0.5", "ema.0.9"}
    for name, tensor in generator.items():
        assert tensor.equal(checkpoint[f"ema.0.9/module.{name}"])
    weights = [name for name, tensor in generator.items() if name.endswith("weight")]
    assert not any(checkpoint[f"ema.0.9/module.{name}"].equal(checkpoint[f"ema.0.5/module.{name}"]) for name in weights)


def test_the_rate_is_logged(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    rate = Config.load(whole / "config.json").training.lr
    assert lines[1]["lr"] == rate, "of the step after the warm-up"
    assert lines[0]["lr"] == rate / 2
    assert lines[-1]["lr"] == pytest.approx(1e-5)
    assert [line["lr"] for line in lines[1:]] == sorted((line["lr"] for line in lines[1:]), reverse=True)


def test_the_length_of_a_falling_schedule_stays(whole: Path, finished: Path, capsys) -> None:
    code, errors = command(train.main, ["--resume", "--steps", "12", "--out", str(whole)], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "--steps: the run was started with 6, it cannot be resumed with 12" in errors
    assert "setting_steps" in Config.load(whole / "config.json").fixed()
    assert "setting_steps" not in Config.load(finished / "config.json").fixed()


@pytest.mark.parametrize(
    "more", ["--lr-schedule=cosine", "--clip-grad=1", "--optimizer=adamw", "--generator-ema=.5,.9"]
)
def test_what_changes_numbers_cannot_change(more: str, finished: Path, capsys) -> None:
    code, errors = command(train.main, ["--resume", "--out", str(finished), more], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert f"{more.split('=')[0]}: the run was started with" in errors


def test_a_run_of_before_resumes(flags: list[str], tmp_path: Path) -> None:
    """Its settings, checkpoint and fingerprint know nothing of all this, and it has one average."""
    argv = [*flags, "--generator-ema", "0.5"]
    train.main([*argv, "--out", str(tmp_path / "whole")])
    parts = without_last(tmp_path / "whole", tmp_path / "parts")
    config: dict[str, Any] = json.loads((parts / "config.json").read_text())
    new = config.pop("updates")
    (parts / "config.json").write_text(json.dumps(config))
    file = parts / "checkpoints" / "step_00000004.safetensors"
    checkpoint = Checkpoint.load(file)
    del checkpoint.parts["skipped"]
    assert "n_averaged" in checkpoint.parts["ema"]
    checkpoint.fingerprint = {key: value for key, value in checkpoint.fingerprint.items() if key[8:] not in new}
    checkpoint.save(file)
    train.main(["--resume", "--out", str(parts)])
    assert same_run(tmp_path / "whole", parts)
