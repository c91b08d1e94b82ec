"""The training command from outside: reproducible, resumable, killable, and clear about mistakes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import DETERMINISTIC, command, metrics, same_run, start
from PIL import Image
from safetensors.torch import load_file

import engine.support.files
from engine import precompute, train
from engine import sample as sampling

pytestmark = pytest.mark.usefixtures("own_cache")


def test_run_folder_holds_what_it_should(finished: Path) -> None:
    assert [row[0] for row in metrics(finished)] == [1, 2, 3, 4, 5, 6]
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert set(first) == {*DETERMINISTIC, "images_per_second", "peak_memory_bytes"}
    assert all(np.isfinite(list(first.values())))
    assert first["loss"] == pytest.approx(first["loss_mean"] + first["loss_variance"], rel=1e-5)
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["step_00000003.png", "step_00000006.png"]
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == [
        "step_00000004.safetensors",
        "step_00000006.safetensors",
    ]
    with Image.open(finished / "samples.png") as picture:
        assert picture.size == (8 * 34 + 2, 8 * 34 + 2)
    with Image.open(finished / "loss.png") as picture:
        picture.load()
    assert list((finished / "tensorboard").iterdir())
    assert not list(finished.rglob("*.tmp"))


def test_tensorboard_holds_scalars_and_images(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([row[1] for row in metrics(finished)], rel=1e-5)
    assert [image.step for image in events.Images("samples")] == [3, 6]


def test_same_seed_same_bits_other_seed_other_bits(flags: list[str], finished: Path, tmp_path: Path) -> None:
    train.main([*flags, "--out", str(tmp_path / "again")])
    assert same_run(finished, tmp_path / "again")
    train.main([*flags, "--out", str(tmp_path / "other"), "--seed", "1"])
    assert metrics(finished) != metrics(tmp_path / "other")


def test_config_reproduces_the_run(finished: Path, tmp_path: Path) -> None:
    train.main(["--config", str(finished / "config.json"), "--out", str(tmp_path / "again")])
    assert same_run(finished, tmp_path / "again")


@pytest.mark.parametrize(
    "more",
    [
        ["--averager", "ama", "--generator-ema", "0.9"],
        ["--averager", "ama", "--ama-variant", "authors"],
        ["--averager", "ma"],
        ["--averager", "none", "--amp"],
    ],
    ids=lambda more: "-".join(more).replace("--", ""),
)
def test_resumed_equals_uninterrupted(more: list[str], flags: list[str], tmp_path: Path) -> None:
    train.main([*flags, *more, "--out", str(tmp_path / "whole")])
    train.main([*flags, *more, "--out", str(tmp_path / "parts"), "--steps", "3"])
    train.main(["--resume", "--out", str(tmp_path / "parts"), "--steps", "6"])
    assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_fp16_resumes_with_its_loss_scaling(flags: list[str], tmp_path: Path) -> None:
    argv = [*flags, "--amp", "--amp-dtype", "fp16"]
    train.main([*argv, "--out", str(tmp_path / "whole")])
    train.main([*argv, "--steps", "4", "--out", str(tmp_path / "parts")])
    train.main(["--resume", "--steps", "6", "--out", str(tmp_path / "parts")])
    assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_drops_metrics_after_the_checkpoint(flags: list[str], finished: Path, tmp_path: Path) -> None:
    train.main([*flags, "--out", str(tmp_path / "run"), "--steps", "5"])
    (tmp_path / "run/checkpoints/step_00000005.safetensors").unlink()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "6"])
    assert same_run(finished, tmp_path / "run")


def test_ctrl_c_writes_a_checkpoint(flags: list[str], finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start([*flags, "--out", str(out), "--steps", "100000", "--checkpoint-every", "100000"])
    deadline = time.monotonic() + 120
    while len(metrics(out)) < 1 if (out / "metrics.jsonl").exists() else True:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    (checkpoint,) = (out / "checkpoints").iterdir()
    step = int(checkpoint.stem.split("_")[1])
    assert len(metrics(out)) == step
    train.main(["--resume", "--out", str(out), "--steps", str(step + 1)])
    assert [row[0] for row in metrics(out)] == list(range(1, step + 2))


def test_diverging_run_stops_and_keeps_its_checkpoint(flags, tmp_path: Path, monkeypatch, capsys) -> None:
    from engine.training.trainer import Trainer

    step = Trainer.train_step

    def poisoned(self: Trainer) -> torch.Tensor:
        if self.step == 4:
            next(self.method.modules["generator"].parameters()).data[0] = float("nan")
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    code, errors = command(train.main, [*flags, "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    line = errors.strip().splitlines()[-1]
    assert "NaN or infinite at step 5" in line
    assert "step_00000004.safetensors" in line
    monkeypatch.undo()
    state = load_file(tmp_path / "run/checkpoints/step_00000004.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point())
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(tmp_path / "run/generator.safetensors").values())


def test_a_refused_write_is_one_line_and_loses_nothing(flags, finished: Path, tmp_path: Path) -> None:
    """A real limit of the kernel's: no file may grow beyond 300 KB, and a checkpoint does."""
    out = tmp_path / "run"
    train.main([*flags, "--out", str(out), "--steps", "2"])
    before = (out / "checkpoints/step_00000002.safetensors").read_bytes()
    prelude = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, {resource.RLIM_INFINITY}))
"""
    process = start(["--resume", "--out", str(out), "--steps", "6"], prelude)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "ulimit -f" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    assert (out / "checkpoints/step_00000002.safetensors").read_bytes() == before
    assert not list(out.rglob("*.tmp"))
    train.main(["--resume", "--out", str(out), "--steps", "6"])
    assert same_run(finished, out)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_checkpoint_is_one_line_that_names_it(damage: str, flags, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    train.main([*flags, "--out", str(out), "--steps", "4"])
    checkpoint = out / "checkpoints/step_00000004.safetensors"
    whole = checkpoint.read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2],
        "foreign": (out / "generator.safetensors").read_bytes(),
        "empty": b"",
    }
    checkpoint.write_bytes(content[damage])
    code, errors = command(train.main, ["--resume", "--out", str(out), "--steps", "6"], capsys)
    assert code == 2
    assert checkpoint.name in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    # Doing what the line says works.
    checkpoint.unlink()
    train.main(["--resume", "--out", str(out), "--steps", "6"])
    assert len(metrics(out)) == 6


def test_target_of_something_else_is_refused(flags, finished: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "target.safetensors"
    precompute.main([*flags, "--out", str(target)])
    train.main([*flags, "--target", str(target), "--out", str(tmp_path / "same")])
    assert same_run(finished, tmp_path / "same")
    for change, mention in (
        (["--seed", "5"], "weights"),
        (["--amp"], "precision"),
        (["--layers", "1"], "layers"),
    ):
        argv = [*flags, *change, "--target", str(target), "--out", str(tmp_path / "other")]
        code, errors = command(train.main, argv, capsys)
        assert code == 2
        assert mention in errors
        assert str(target) in errors


def test_profile_writes_a_trace_and_prints_the_top(flags, finished: Path, tmp_path: Path, caplog) -> None:
    with caplog.at_level("INFO", logger="gfmn"):
        train.main([*flags, "--profile", "2", "--out", str(tmp_path / "run")])
    events = json.loads((tmp_path / "run" / "profile.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert len(steps) == 2
    assert any("gfmn::relu_moments" in str(event.get("name")) for event in events)
    assert "Self CPU time total" in caplog.text
    assert same_run(tmp_path / "run", finished), "looking changes nothing"


def test_profile_longer_than_the_run_is_one_line(flags, tmp_path: Path, capsys) -> None:
    code, error = command(train.main, [*flags, "--profile", "5", "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    assert "--profile: 5 steps after 2 of warm-up are more than 6" in error


def test_recomputation_changes_nothing(flags, finished: Path, tmp_path: Path) -> None:
    more = ["--recompute", "stages", "--recompute-generator"]
    train.main([*flags, *more, "--out", str(tmp_path / "run")])
    assert same_run(tmp_path / "run", finished)


def test_sampling(finished: Path, tmp_path: Path, capsys) -> None:
    def draw(name: str, *more: str) -> Path:
        sampling.main(["--run", str(finished), "--count", "20", "--out", str(tmp_path / name), *more])
        return tmp_path / name

    images = np.load(draw("a.npy"))
    assert images.shape == (20, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.load(draw("b.npy")))
    assert not np.array_equal(images, np.load(draw("c.npy", "--seed", "1")))
    with Image.open(draw("grid.png")) as picture:
        assert picture.size == (5 * 34 + 2, 4 * 34 + 2)
        assert np.array_equal(np.asarray(picture)[2:34, 2:34], images[0])
    path = np.load(draw("path.npy", "--interpolate"))
    steps = np.abs(np.diff(path[:8].astype(float), axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < np.abs(path[7].astype(float) - path[0]).mean()
    for argv in (["--count", "0"], ["--out", "x.jpg"], ["--run", str(tmp_path / "nothing")], ["--run", str(tmp_path)]):
        base = ["--run", str(finished), "--count", "4", "--out", str(tmp_path / "d.png")]
        code, errors = command(sampling.main, [*base, *argv], capsys)
        assert (code, errors.count("\n")) == (2, 1)
        assert argv[0] in errors


def test_without_dali_compiler_and_network(flags, finished: Path, tmp_path: Path) -> None:
    """Everything optional is missing at once: it trains all the same, says what it does without, and samples."""
    prelude = """
import socket, sys
sys.modules["nvidia.dali"] = None
def refuse(*arguments, **options):
    raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""
    (tmp_path / "bin").mkdir()
    argv = [flag for flag in flags if flag not in ("--kernels", "reference", "--loader", "torch")]
    process = start([*argv, "--out", str(tmp_path / "run")], prelude, PATH=str(tmp_path / "bin"), CXX="")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    said = errors.splitlines()
    assert sum("C++ compiler" in line for line in said) == 1, errors
    assert sum("DALI" in line for line in said) == 1, errors
    assert same_run(finished, tmp_path / "run")
    script = f"{prelude}\nfrom engine.sample import main\nmain()"
    argv = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "samples.png")]
    environment = {**os.environ, "PATH": str(tmp_path / "bin")}
    subprocess.run([sys.executable, "-c", script, *argv], check=True, env=environment)


def test_folder_of_images_trains(tmp_path: Path, pictures: Path, flags: list[str], monkeypatch) -> None:
    """`--data DIR`, with an extractor that is pretrained (briefly) on the folder itself."""
    monkeypatch.setattr("engine.representation.pretraining.recipe.DEFAULT_STEPS", (3, 3))
    for index, image in enumerate(np.load(pictures)):
        path = tmp_path / "photos" / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    argv = [*flags, "--data", str(tmp_path / "photos"), "--weights", "pretrain", "--out", str(tmp_path / "run")]
    train.main([*argv, "--steps", "2", "--loader", "auto"])
    assert len(metrics(tmp_path / "run")) == 2


def test_nothing_is_left_when_a_write_fails(tmp_path: Path, monkeypatch, capsys, finished: Path) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine.support.files.os, "fsync", full)
    out = tmp_path / "samples.npy"
    code, errors = command(sampling.main, ["--run", str(finished), "--out", str(out)], capsys)
    assert code == 2
    assert "the disk is full" in errors
    assert list(tmp_path.iterdir()) == []
