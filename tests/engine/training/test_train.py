"""The training command from outside: reproducible, resumable, killable, and clear about mistakes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import engine.support.files
from engine import precompute, train
from engine import sample as sampling
from engine.configuration.command import run_command
from pipelines import ImageLoader, open_dataset

pytestmark = pytest.mark.usefixtures("own_cache")

DETERMINISTIC = ("step", "loss", "loss_mean", "loss_variance", "difference_norm")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty real digits in a file."""
    images = next(iter(ImageLoader(open_dataset("digits"), 40, backend="torch"))).images
    path = tmp_path_factory.mktemp("data") / "digits.npy"
    np.save(path, images.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return path


@pytest.fixture(scope="module")
def flags(pictures: Path) -> list[str]:
    """A run of six quick steps."""
    text = f"""--data {pictures} --weights random --batch-size 4 --steps 6 --layers 2 --nz 8 --kernels reference
        --loader torch --log-every 1 --sample-every 3 --checkpoint-every 2 --threads 1"""
    return text.split()


@pytest.fixture(scope="module")
def finished(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train.main([*flags, "--out", str(out)])
    return out


def metrics(run: Path, names: Sequence[str] = DETERMINISTIC) -> list[tuple]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in names) for line in lines]


def same_run(one: Path, other: Path) -> bool:
    weights = (one / "generator.safetensors").read_bytes() == (other / "generator.safetensors").read_bytes()
    return weights and metrics(one) == metrics(other)


def command(main: Callable, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the lines on standard error of a command that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_command(main, argv)
    return int(exit_.value.code or 0), capsys.readouterr().err


def start(argv: Sequence[str], prelude: str = "", **environment: str) -> subprocess.Popen[str]:
    """The training command in a process of its own, after the Python statements of `prelude`."""
    run = "import sys\nfrom engine.configuration.command import run_command\nfrom engine.train import main\n"
    run += "run_command(main)"
    script = f"{prelude}\n{run}"
    return subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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


def test_resume_drops_metrics_after_the_checkpoint(flags: list[str], finished: Path, tmp_path: Path) -> None:
    train.main([*flags, "--out", str(tmp_path / "run"), "--steps", "5"])
    (tmp_path / "run/checkpoints/step_00000005.safetensors").unlink()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "6"])
    assert same_run(finished, tmp_path / "run")


@pytest.mark.parametrize(
    "victim",
    ["checkpoint", "generator", "config"],
)
def test_kill_in_the_middle_of_writing_a_file(victim: str, flags: list[str], finished: Path, tmp_path: Path) -> None:
    """kill -9 after a file's bytes were written and before it took its place, the second time that it is written."""
    name = {"checkpoint": "step_", "generator": "generator", "config": "config"}[victim]
    nth = 1 if victim == "config" else 2
    prelude = f"""
import os, signal
replace, seen = os.replace, []
def replace_or_die(source, target):
    if {name!r} in str(target):
        seen.append(target)
        if len(seen) == {nth}:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
"""
    out = tmp_path / "run"
    process = start([*flags, "--out", str(out)], prelude)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert list(out.rglob(".*.tmp"))
    # Killed over its configuration, the run had not begun: the folder counts as new.
    train.main([*flags, "--out", str(out)] if victim == "config" else ["--resume", "--out", str(out)])
    assert same_run(finished, out)
    assert not list(out.rglob(".*.tmp"))


def test_kill_at_any_moment(flags: list[str], finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start([*flags, "--out", str(out), "--checkpoint-every", "1"])
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    train.main(["--resume", "--out", str(out)])
    assert same_run(finished, out)


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
            next(self.generator.parameters()).data[0] = float("nan")
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


BAD_INPUT = {
    "preset": (["--preset", "nothing"], "--preset"),
    "extractor": (["--extractor", "nothing"], "--extractor"),
    "extractor in a pair": (["--extractor", "vgg-small+nothing"], "nothing"),
    "generator": (["--generator", "nothing"], "--generator"),
    "data that is not there": (["--data", "no/such/folder"], "no/such/folder"),
    "empty folder": (["--data", "EMPTY"], "EMPTY"),
    "image size of the extractor": (["--image-size", "36"], "36"),
    "image size of the generator": (["--image-size", "48"], "48"),
    "minibatch of one": (["--batch-size", "1"], "--batch-size"),
    "not a number": (["--batch-size", "many"], "--batch-size"),
    "no steps": (["--steps", "0"], "--steps"),
    "learning rate": (["--lr", "-1"], "--lr"),
    "AMA's learning rate": (["--ama-lr", "0"], "--ama-lr"),
    "moving average": (["--averager", "ma", "--ma-alpha", "2"], "--ma-alpha"),
    "chunk larger than minibatch": (["--chunk-size", "5"], "--chunk-size"),
    "chunks with batch statistics": (["--chunk-size", "2", "--extractor-bn", "batch"], "--chunk-size"),
    "contradicting kernels": (["--no-fused-ama", "--kernels", "compiled"], "--no-fused-ama"),
    "ema": (["--generator-ema", "1"], "--generator-ema"),
    "layers": (["--layers", "0"], "--layers"),
    "weights that are not there": (["--weights", "nothing.safetensors"], "nothing.safetensors"),
    "weights for one of two": (["--extractor", "vgg-small+vgg-small", "--weights", "a"], "--weights"),
    "target that is not there": (["--target", "nothing.safetensors"], "nothing.safetensors"),
    "unknown flag": (["--frobnicate"], "--frobnicate"),
    "resume without out": (["--resume"], "--resume"),
    "config that is not there": (["--config", "nothing.json"], "nothing.json"),
}


@pytest.mark.parametrize("case", BAD_INPUT, ids=str)
def test_bad_input_is_one_line(case: str, flags, tmp_path: Path, monkeypatch, capsys) -> None:
    argv, mention = BAD_INPUT[case]
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    base = [] if argv[0] == "--config" else flags
    out = [] if "--resume" in argv else ["--out", "run"]
    code, errors = command(train.main, [*base, *argv, *out], capsys)
    assert code == 2
    # Before the error there may be lines on what was done: they never say "error".
    lines = [line for line in errors.splitlines() if "error" in line]
    assert len(lines) == 1, errors
    assert mention in lines[0]
    assert "Traceback" not in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line(flags, tmp_path: Path, capsys) -> None:
    code, errors = command(train.main, [*flags, "--device", "cuda", "--out", str(tmp_path / "run")], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "--device" in errors


def test_preset_without_weights_or_data_is_one_line(tmp_path: Path, capsys) -> None:
    for preset in ("cifar10", "stl10", "celeba64", "celeba128", "lsun64"):
        code, errors = command(train.main, ["--preset", preset, "--out", str(tmp_path / "run")], capsys)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert not (tmp_path / "run").exists()


def test_out_that_holds_another_run(finished: Path, flags, tmp_path: Path, capsys) -> None:
    code, errors = command(train.main, [*flags, "--out", str(finished)], capsys)
    assert code == 2
    assert "--resume" in errors
    (tmp_path / "notes.txt").write_text("not a run")
    code, errors = command(train.main, [*flags, "--out", str(tmp_path)], capsys)
    assert code == 2
    assert str(tmp_path) in errors
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_refuses_what_would_change_the_result(finished: Path, capsys, tmp_path: Path) -> None:
    code, errors = command(train.main, ["--resume", "--out", str(finished), "--lr", "0.1"], capsys)
    assert code == 2
    assert "--lr" in errors
    code, errors = command(train.main, ["--resume", "--out", str(tmp_path / "nothing")], capsys)
    assert code == 2
    assert "nothing" in errors


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
        (["--seed", "5"], "extractor_weights"),
        (["--amp"], "precision"),
        (["--layers", "1"], "taps"),
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


def test_checkpoints_change_nothing(flags, finished: Path, tmp_path: Path) -> None:
    more = ["--checkpoint", "stages", "--checkpoint-generator"]
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
    monkeypatch.setattr("engine.representation.pretraining.training._DEFAULT_STEPS", (3, 3))
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
