"""A method that reads real images, and has neither extractor nor target, from outside: `helpers.tiny_critic`."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.host_waits import fake_cuda_trainer, host_waits
from helpers.jobs import ends, start_ranks
from helpers.recorded_graphs import RecordedGraphs, RecordedLane
from helpers.runs import command, metrics, start
from helpers.small_steps import configuration, device_step, small_trainer
from helpers.step_trace import capture_faults
from helpers.tiny_critic import NAME, TinyCritic, register
from PIL import Image

from engine import precompute, report, sample, train
from engine.configuration.config import Config
from engine.configuration.modelling import predict
from engine.configuration.planning import Planner
from engine.generation.drawn_ahead import DrawnAhead
from engine.support.errors import Interrupted
from engine.training.graphs import EAGER_STEPS
from engine.training.planner import num_bytes
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer
from kernels import reference
from pipelines import ImageStream

STEPS = 8
REGISTERED = "import pytest\nfrom helpers.tiny_critic import register\nregister(pytest.MonkeyPatch())"
"""What a command in a process of its own has to do first."""
NAMES = ("step", "loss", "loss_critic")


@pytest.fixture(scope="module", autouse=True)
def known(own_cache: None):
    """The method's name, in every test here."""
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures in files, five of which no decoder takes: no minibatch of 3 is spared for long."""
    folder = tmp_path_factory.mktemp("photos") / "pictures"
    folder.mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (23, 40, 41, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:02d}.png")
    for number in (1, 4, 8, 9, 17):
        (folder / f"{number:02d}.png").write_bytes(b"no picture")
    return folder


def flags_of(photos: Path, loader: str) -> list[str]:
    text = f"""--method {NAME} --data {photos} --skip-bad-images --loader {loader} --generator-ema 0.9
        --batch-size 3 --steps {STEPS} --nz 4 --lr 1e-3 --kernels reference --device cpu --threads 1
        --log-every 1 --sample-every 100 --checkpoint-every 2 --keep-checkpoints 9"""
    return text.split()


@pytest.fixture
def flags(photos: Path) -> list[str]:
    return flags_of(photos, "torch")


@pytest.fixture(scope="module", params=["torch", "dali"])
def whole(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A loader, and the folder of a run that was never stopped."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    out = tmp_path_factory.mktemp("whole") / request.param
    train.main([*flags_of(photos, request.param), "--out", str(out)])
    return request.param, out


def same(one: Path, other: Path) -> bool:
    files = [run / "checkpoints" / f"step_{STEPS:08d}.safetensors" for run in (one, other)]
    return files[0].read_bytes() == files[1].read_bytes() and metrics(one, NAMES) == metrics(other, NAMES)


def test_resumed_equals_uninterrupted(whole: tuple[str, Path], photos: Path, tmp_path: Path) -> None:
    """A step takes two minibatches of an epoch's seven, so an epoch ends in the middle of the fourth."""
    run, stop = tmp_path / "run", {"torch": "3", "dali": "6"}[whole[0]]
    train.main([*flags_of(photos, whole[0]), "--steps", stop, "--out", str(run)])
    train.main(["--resume", "--steps", str(STEPS), "--out", str(run)])
    assert same(run, whole[1])
    assert not list(run.glob("target*"))
    assert not list(run.glob("extractor*"))


def test_a_signal_while_a_step_waits_for_images(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    run, read, seen = RunFolder(tmp_path / "run"), ImageStream.__next__, []
    train.main([*flags, "--out", str(tmp_path / "whole")])

    def interrupted(stream: ImageStream) -> Any:
        seen.append(stream)
        if len(seen) == 5:  # the first minibatch of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return read(stream)

    with monkeypatch.context() as patch:
        patch.setattr(ImageStream, "__next__", interrupted)
        with pytest.raises(Interrupted, match="stopped at step 3 of 8") as stopped:
            train.main([*flags, "--out", str(run.path)])
    assert stopped.value.status == 128 + signal.SIGTERM
    checkpoint = run.newest_checkpoint()
    assert checkpoint is not None
    place = {name: int(value) for name, value in checkpoint.parts["images"].items()}
    assert (checkpoint.step, place) == (3, {"epoch": 0, "position": 6})
    train.main(["--resume", "--out", str(run.path)])
    assert same(run.path, tmp_path / "whole")


def test_a_graphed_run_has_the_same_bits(whole: tuple[str, Path], photos: Path, tmp_path: Path, monkeypatch) -> None:
    graphs = RecordedGraphs()

    def machinery(config: Config, device: torch.device) -> dict[str, Any]:
        noise = DrawnAhead(config.training.seed, RecordedLane())
        return {"noise": noise, "kernels": reference, "graphs": graphs}

    monkeypatch.setattr(train, "make_machinery", machinery)
    run = tmp_path / "run"
    train.main([*flags_of(photos, whole[0]), "--out", str(run)])
    assert graphs.log == ["aside"] * EAGER_STEPS + ["capture"] + ["replay"] * (STEPS - EAGER_STEPS)
    assert same(run, whole[1])


def small(graphs: RecordedGraphs | None = None, **settings: Any) -> Trainer:
    return small_trainer(configuration("digits", {"method": NAME, **settings}), graphs=graphs)


def test_steps_can_be_captured_and_never_wait_for_the_device() -> None:
    assert capture_faults(device_step(small())) == []

    def make():
        step = device_step(fake_cuda_trainer(configuration("digits", {"method": NAME})))
        return lambda: step(contextlib.nullcontext())

    assert host_waits(make, 3) == []


def growing(trainer: Trainer, critic_steps: list[int]) -> Trainer:
    """Whose step number n takes `critic_steps[n]` minibatches."""
    method = trainer.method
    assert isinstance(method, TinyCritic)
    step = method.step

    def grown(*given: Any) -> Any:
        method.critic_steps = critic_steps[trainer.step]
        return step(*given)

    method.step = grown  # type: ignore[method-assign]
    return trainer


def test_a_step_that_takes_more_images_than_the_ones_before_is_not_captured(caplog) -> None:
    counts = [1, 1, 1, 2, 3, 1, 2]
    trainers = growing(small(graphs := RecordedGraphs()), counts), growing(small(), counts)
    for _ in counts:
        assert torch.equal(*(trainer.train_step()["loss"] for trainer in trainers))
    assert graphs.log == ["aside"] * EAGER_STEPS + ["capture"]
    assert "in a CUDA graph (the step takes more minibatches of real images than the step before)" in caplog.text


def test_a_method_that_says_so_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps may take fewer images than those before, which no capture could notice."""
    monkeypatch.setattr(TinyCritic, "capturable", False)
    counts = [2, 2, 2, 2, 1, 3, 1]
    trainers = growing(small(graphs := RecordedGraphs()), counts), growing(small(), counts)
    for _ in counts:
        assert torch.equal(*(trainer.train_step()["loss"] for trainer in trainers))
    assert graphs.log == []


def test_images_that_nobody_reads_are_refused() -> None:
    trainer = small()
    matching = small_trainer(configuration("digits", {}))
    with pytest.raises(ValueError, match="images: none for a method that reads images"):
        Trainer(trainer.method, trainer.schedule, trainer.run, {})
    with pytest.raises(ValueError, match="images: some for a method that reads nothing"):
        Trainer(matching.method, trainer.schedule, trainer.run, {}, images=trainer.images)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--extractor", "vgg19"], "--extractor: belongs to the methods that compare features, and this is --method"),
        (["--weights", "imagenet"], "--weights: belongs to the methods that compare features"),
        (["--layers", "2"], "--layers: belongs to the methods that compare features"),
        (["--chunk-size", "auto"], "--chunk-size: belongs to the methods that compare features"),
        (["--recompute", "stages"], "--recompute: belongs to the methods that compare features"),
        (["--target", "t.safetensors"], "--target: belongs to the methods that compare features"),
        (["--averager", "ma"], "--averager: belongs to --method gfmn"),
        (["--batch-size", "24"], "--batch-size: 24 is more than the 23 images of images; give at most 23"),
        (["--memory-budget", "1MB"], "--memory-budget: these settings need"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(given: list[str], line: str, flags: list[str], tmp_path: Path, capsys) -> None:
    code, errors = command(train.main, [*flags, *given, "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    assert line in errors.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_nothing_to_precompute(flags: list[str], tmp_path: Path, capsys) -> None:
    code, errors = command(precompute.main, [*flags, "--out", str(tmp_path / "target.safetensors")], capsys)
    assert code == 2
    assert errors.splitlines()[-1] == f"error: --method: {NAME} compares with no target, so there is none to compute"
    assert not list(tmp_path.iterdir())


def test_other_images_or_another_decoder_are_refused(
    whole: tuple[str, Path], tmp_path: Path, photos: Path, capsys
) -> None:
    name, run = whole
    other = {"torch": "dali", "dali": "torch"}[name]
    more = ["--resume", "--steps", "9", "--out", str(run)]
    code, errors = command(train.main, [*more, "--loader", other], capsys)
    assert code == 2
    assert "decoder of the images was" in errors.splitlines()[-1]
    assert errors.splitlines()[-1].endswith(f"with --loader {name} they agree")
    changed = tmp_path / "pictures"
    changed.mkdir()
    for file in photos.iterdir():
        Image.new("RGB", (40, 41)).save(changed / file.name)
    code, errors = command(train.main, [*more, "--data", str(changed)], capsys)
    assert code == 2
    assert "the data set's pictures changed" in errors.splitlines()[-1]


def test_a_plan_and_a_budget(flags: list[str], capsys) -> None:
    train.main([*flags, "--plan", "--memory-budget", "1GB"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{NAME} at 32×32, dcgan generator, minibatch 3, float32.")
    rows = [line.split() for line in lines if line.startswith("      3 ")]
    assert [(row[1], row[2], row[-1]) for row in rows] == [("none", "kept", "yes"), ("none", "recomputed", "yes")]
    config = Config.build("digits", {"method": NAME, "batch_size": 50, "nz": 4})
    planner = Planner(config)
    assert planner.extractor is None
    found = predict(config, planner.generator, None, networks=planner.networks)
    assert found.weights == num_bytes(planner.generator, planner.networks["critic"])
    image = 3 * 32 * 32 * 4
    assert found.peak - found.between_steps > 2 * 50 * image
    assert found.between_steps > 3 * num_bytes(planner.generator), "Adam's two, and gradients"


@pytest.mark.slow
def test_what_comes_after_training(flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("torch_fidelity")
    run = tmp_path / "run"
    judged = ["--evaluate-every", "4", "--evaluate-samples", "8", "--evaluate-extractor", "efficientnet-lite0"]
    train.main([*flags, *judged, "--out", str(run)])
    assert (run / "generator_best.safetensors").exists()
    sample.main(["--run", str(run), "--count", "3", "--out", str(tmp_path / "samples.npy")])
    assert np.load(tmp_path / "samples.npy").shape == (3, 32, 32, 3)
    report.main(["--run", str(run), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert NAME in page
    assert "matched to" not in page
    assert "chunk_size" not in page


@pytest.mark.slow
def test_two_then_one_then_three_ranks(flags: list[str], pictures: Path, tmp_path: Path) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    clean = [*flags, "--data", str(pictures), "--lr", "1e-6", "--batch-size", "6"]
    train.main([*clean, "--out", str(alone)])
    code = f"{REGISTERED}\nfrom engine import train\nfrom engine.configuration.command import run_command\n"
    code += "run_command(train.main)"
    for ranks, steps in ((2, 3), (1, 5), (3, STEPS)):
        argv = [*clean, "--steps", str(steps)] if steps == 3 else ["--resume", "--steps", str(steps)]
        for status, errors in ends(start_ranks([["-c", code, *argv, "--out", str(run)]] * ranks)):
            assert status == 0, errors
    for ours, theirs in zip(metrics(run, NAMES), metrics(alone, NAMES), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.slow
def test_killed_anywhere(flags: list[str], tmp_path: Path) -> None:
    """kill -9, of a run that reads on while it is killed."""
    draw, whole, run = random.Random(0), tmp_path / "whole", tmp_path / "run"
    train.main([*flags, "--out", str(whole)])
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    for kill in (True, True, True, False):
        argv = ["--resume", "--out", str(run)] if (run / "config.json").exists() else [*flags, "--out", str(run)]
        process = start(argv, f"{REGISTERED}\n{SLOWLY}", PYTHONPATH=path)
        steps, deadline = len(lines(run)) + draw.randint(1, 2), time.monotonic() + 60
        while kill and len(lines(run)) < steps and time.monotonic() < deadline:
            time.sleep(0.01)
        if kill:
            time.sleep(draw.uniform(0, 0.2))
            process.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if kill else 0), errors
    assert same(run, whole)


SLOWLY = """
import time
from pipelines import ImageStream
read = ImageStream.__next__
def read_slowly(stream):
    time.sleep(0.05)
    return read(stream)
ImageStream.__next__ = read_slowly
"""


def lines(run: Path) -> list[str]:
    log = run / "metrics.jsonl"
    return log.read_text().splitlines() if log.exists() else []
