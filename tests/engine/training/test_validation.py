"""Evaluation during training: what is logged and kept, and when the learning rate is lowered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.marks import slow
from helpers.runs import command
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import sample, train
from engine.configuration.command import run_command
from engine.evaluation.judges import evaluation_network
from engine.evaluation.metrics import compute_metrics
from engine.generation.saved import load_sampler
from engine.representation.pretraining import pretrain
from engine.training import trainer
from engine.training.run_folder import RunFolder
from engine.training.validation import FACTOR, PATIENCE, KernelRate
from pipelines import open_dataset, read_pixels

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred real digits in a file."""
    path = tmp_path_factory.mktemp("data") / "digits.npy"
    pixels = read_pixels(open_dataset("digits"), backend="torch")[:100]
    np.save(path, pixels.permute(0, 2, 3, 1).numpy())
    return path


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small classifier that no run here is trained on."""
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    pretrain("vgg-small", open_dataset("digits"), task="classify", image_size=32, steps=3, seed=9).save(path)
    return path


@pytest.fixture(scope="module")
def flags(pictures: Path, judge: Path) -> list[str]:
    text = f"""--data {pictures} --weights random --batch-size 4 --steps 8 --layers 1 --nz 8 --kernels reference
        --loader torch --log-every 3 --sample-every 100 --checkpoint-every 2 --threads 1
        --evaluate-every 2 --evaluate-samples 60 --evaluate-extractor vgg-small --evaluate-weights {judge}"""
    return text.split()


@pytest.fixture(scope="module")
def finished(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    train.main([*flags, "--lr-adapt", "kid", "--lr", "1e-12", "--out", str(out)])
    return out


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run: Path) -> dict[int, dict]:
    return {entry["step"]: entry["evaluation"] for entry in logged(run) if "evaluation" in entry}


def test_metrics_hold_the_evaluations(finished: Path) -> None:
    assert [entry["step"] for entry in logged(finished)] == [2, 3, 4, 6, 8]
    found = evaluations(finished)
    assert list(found) == [2, 4, 6, 8]
    for evaluation in found.values():
        assert evaluation["network"] == "vgg-small"
        assert (evaluation["samples"], evaluation["real"]) == (60, 100)
        assert evaluation["is_inception"] is False
    assert "three_sample_p" not in found[2]
    assert all(0 <= found[step]["three_sample_p"] <= 1 for step in (4, 6, 8))


def test_tensorboard_holds_the_evaluations(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    drawn = {event.step: event.value for event in events.Scalars("evaluation/kernel_distance")}
    assert drawn == pytest.approx({step: one["kernel_distance"] for step, one in evaluations(finished).items()}, 1e-5)
    assert len(events.Scalars("lr")) == 4


def test_numbers_are_those_of_engine_evaluate(flags: list[str], judge: Path, pictures: Path, tmp_path: Path) -> None:
    """The same samples, judged by torch-fidelity from the images on."""
    run = tmp_path / "run"
    train.main([*flags, "--steps", "2", "--out", str(run)])
    saved = load_sampler(run / "generator.safetensors")
    samples = saved.images(saved.prior.draw(60, seed=1_000_003 * 2))
    pixels = samples.add(1).mul(127.5).round().to(torch.uint8)
    real = torch.from_numpy(np.load(pictures)).permute(0, 3, 1, 2).contiguous()
    network = evaluation_network("vgg-small", weights=judge, image_size=32)
    expected = compute_metrics(pixels, real, network, ("fid", "kid"), device="cpu", seed=0, kid_subset_size=60)
    found = evaluations(run)[2]
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_best_generator_is_kept(finished: Path, tmp_path: Path) -> None:
    distances = {step: evaluation["kernel_distance"] for step, evaluation in evaluations(finished).items()}
    best = min(distances, key=lambda step: distances[step])
    assert load_sampler(finished / "generator_best.safetensors").step == best
    assert (finished / "checkpoints/best.safetensors").exists()
    sample.main(["--run", str(finished), "--best", "--count", "2", "--out", str(tmp_path / "samples.npy")])
    assert np.load(tmp_path / "samples.npy").shape == (2, 32, 32, 3)


def test_a_kill_before_the_best_generator_loses_nothing(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    """The best checkpoint is there, its generator is not, and there is no other checkpoint to resume from."""
    argv = [*flags, "--steps", "4", "--checkpoint-every", "100"]
    train.main([*argv, "--out", str(tmp_path / "whole")])
    run, save = tmp_path / "run", trainer.save_sampler

    def killed(path: Path, *arguments) -> None:
        if path.name == "generator_best.safetensors":
            raise KeyboardInterrupt
        save(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_sampler", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main([*argv, "--out", str(run)])
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["best.safetensors"]
    steps = []
    step = trainer.Trainer.train_step
    monkeypatch.setattr(trainer.Trainer, "train_step", lambda self: steps.append(self.step) or step(self))
    train.main(["--resume", "--out", str(run)])
    assert steps[0] == 2
    assert [entry["step"] for entry in logged(run)] == [2, 3, 4]
    assert evaluations(run) == evaluations(tmp_path / "whole")
    name = "generator_best.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_network_that_evaluates_may_move_and_not_change(flags, judge: Path, tmp_path: Path, capsys) -> None:
    run, moved, other = tmp_path / "run", tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    train.main([*flags, "--steps", "2", "--out", str(run)])
    shutil.copy(judge, moved)
    save_file({name: value + 1 for name, value in load_file(judge).items()}, other)
    resume = ["--resume", "--out", str(run), "--steps", "4", "--evaluate-weights"]
    code, errors = command(train.main, [*resume, str(other)], capsys)
    assert code == 2
    assert str(run) in errors.splitlines()[-1]
    train.main([*resume, str(moved)])
    assert list(evaluations(run)) == [2, 4]


def test_samples_that_do_not_change_lower_the_rate(finished: Path) -> None:
    """At a rate of 1e-12 nothing moves: the reference, then three evaluations that are no closer."""
    rates = {entry["step"]: entry["lr"] for entry in logged(finished) if "evaluation" in entry}
    assert rates == {2: 1e-12, 4: 1e-12, 6: 1e-12, 8: FACTOR * 1e-12}


def test_the_critic_s_rate_is_lowered_as_well(flags: list[str], tmp_path: Path) -> None:
    """As Bińkowski et al. 2018 train MMD-GANs. Running statistics would move at any rate, and the samples with them."""
    judged = flags[flags.index("--evaluate-every") :]
    text = f"""--method mmd-gan --lr 1e-12 --critic-lr 2e-12 --generator dcgan --batch-size 4 --nz 8 --steps 8
        --loader torch --threads 1 --lr-adapt kid --sample-bn batch --out {tmp_path}"""
    train.main([*flags[: flags.index("--weights")], *text.split(), *judged])
    rates = {entry["step"]: entry["lr"] for entry in logged(tmp_path) if "evaluation" in entry}
    assert rates == {2: 1e-12, 4: 1e-12, 6: 1e-12, 8: FACTOR * 1e-12}
    checkpoint = RunFolder(tmp_path).newest_checkpoint()
    assert checkpoint is not None
    kept = {name: float(rate) for name, rate in checkpoint.parts["rates"].items()}
    assert kept == {"generator": FACTOR * 1e-12, "critic": FACTOR * 2e-12}


@pytest.mark.parametrize("stop", [slow(3), 4, slow(7)])
def test_resumed_equals_uninterrupted(stop: int, flags: list[str], finished: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    train.main([*flags, "--lr-adapt", "kid", "--lr", "1e-12", "--out", out, "--steps", str(stop)])
    train.main(["--resume", "--out", out, "--steps", "8"])
    again, expected = evaluations(Path(out)), evaluations(finished)
    assert {step: again[step] for step in expected} == expected
    assert logged(Path(out))[-1]["lr"] == logged(finished)[-1]["lr"]
    weights = (Path(out) / "generator.safetensors").read_bytes()
    assert weights == (finished / "generator.safetensors").read_bytes()


def test_evaluating_does_not_change_the_training(flags: list[str], tmp_path: Path) -> None:
    without = [flag for flag in flags[: flags.index("--evaluate-every")]]
    train.main([*without, "--out", str(tmp_path / "without")])
    train.main([*flags, "--out", str(tmp_path / "with")])
    one, other = (tmp_path / name / "generator.safetensors" for name in ("without", "with"))
    assert one.read_bytes() == other.read_bytes()


def test_judging_by_the_matched_network_is_warned_of(flags: list[str], judge: Path, tmp_path: Path, caplog) -> None:
    index = flags.index("random")
    matched = [*flags[:index], str(judge), *flags[index + 1 :], "--extractor", "vgg-small", "--steps", "2"]
    train.main([*matched, "--out", str(tmp_path / "run")])
    assert "training compares by vgg-small" in caplog.text


def features(shift: float, seed: int) -> Tensor:
    return torch.relu(torch.randn(400, 8, generator=torch.Generator().manual_seed(seed)) + shift)


def test_rate_is_lowered_exactly_when_progress_ends() -> None:
    """Samples that come closer four times, then stay: the third evaluation without progress lowers the rate."""
    rate = KernelRate(features(0.0, 0))
    shifts = [1.0, 0.7, 0.4, 0.2] + [0.2] * (2 * PATIENCE)
    lowered = [rate.update(features(shift, 10 + index))[1] for index, shift in enumerate(shifts)]
    assert lowered == [False] * 4 + [False, False, True] * 2


def test_progress_resets_the_count() -> None:
    rate = KernelRate(features(0.0, 0))
    shifts = [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    lowered = [rate.update(features(shift, 20 + index))[1] for index, shift in enumerate(shifts)]
    assert lowered == [False] * 6 + [True]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--evaluate-every", "0"], "--evaluate-every: must be at least 1"),
        (["--evaluate-every", "2", "--evaluate-samples", "1"], "--evaluate-samples: must be at least 2"),
        (["--lr-adapt", "kid"], "--lr-adapt: needs --evaluate-every"),
        (["--evaluate-every", "2", "--evaluate-extractor", "vgg99"], "--evaluate-extractor: "),
        (["--evaluate-every", "2", "--evaluate-extractor", "vgg-small"], "--evaluate-weights: "),
    ],
)
def test_bad_input_is_one_line(more: list[str], said: str, pictures: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    argv = [*f"--data {pictures} --weights random --layers 1 --loader torch --steps 2".split(), *more]
    with pytest.raises(SystemExit) as exit_:
        run_command(train.main, [*argv, "--out", str(run)])
    assert exit_.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert said in errors[-1]
    assert not (run / "config.json").exists()


def test_a_resumed_run_keeps_its_evaluation(finished: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        run_command(train.main, ["--resume", "--out", str(finished), "--evaluate-every", "3"])
    assert "--evaluate-every: the run was started with 2" in capsys.readouterr().err
