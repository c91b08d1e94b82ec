"""Adversarial runs from outside: resumed bit for bit, divergence by name, one line for what makes no sense."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adversaries import drawn_from
from helpers.jobs import ends, start_job
from helpers.judging import write_weights
from helpers.marks import quick
from helpers.runs import command, metrics, refusal, same_run
from helpers.small_steps import configuration, few_pictures, resumed_equals_whole, small_trainer
from helpers.thread_ranks import on_ranks
from torch import Tensor

from engine import precompute, train
from engine.comparison.games.adversarial import Scalar
from engine.configuration.build import make_generator, make_method, make_networks, of_images
from engine.configuration.config import Config
from engine.support.errors import InputError
from engine.training.divergence import Divergence
from engine.training.ranks import Ranks
from kernels import reference

pytestmark = pytest.mark.usefixtures("own_cache")

SMALL: dict[str, Any] = {"batch_size": 3, "critic_steps": 1}
RESUMED: dict[str, dict[str, Any]] = {
    "all at once": {
        "method": "fisher-gan",
        "fisher_rho": 0.1,
        "critic_norm": "spectral",
        "penalty": ["gradient"],
        "critic_warmup": 3,
        "critic_many": 2,
        "critic_optimizer": "rmsprop",
    },
    "began": {"method": "began", "began_rate": 0.1, "amp": True},
    "mmd": {"method": "mmd-gan", "critic_steps": 2},
    "half precision": {"method": "gan", "amp": True, "amp_dtype": "fp16", "critic_norm": "batch"},
    "labels": {"method": "improved-gan", "classes": 3, "minibatch_discrimination": True},
}


@pytest.mark.parametrize("name", quick(RESUMED, ["all at once"]))
def test_resumed_equals_uninterrupted(name: str) -> None:
    """Bit for bit: weights, spectral vectors, Λ or k, both optimizers, the place among images and random numbers."""
    config = configuration("digits", {**SMALL, **RESUMED[name]})
    changed = resumed_equals_whole(config)
    parts = {key.split(".")[0] for key in changed}
    assert parts >= {"generator", "critic", "optimizer", "images", "random", "ema"}
    if name == "all at once":
        assert {"method.game.multiplier", "method.steps"} <= changed
        assert any(key.endswith(".0.u") for key in changed), "spectral vectors"


@pytest.mark.slow
def test_a_run_trains_and_resumes(pictures: Path, tmp_path: Path) -> None:
    text = f"""--preset r1 --data {pictures} --batch-size 4 --nz 8 --generator dcgan --critic dcgan --loader torch
        --log-every 1 --checkpoint-every 2 --threads 1 --generator-ema .5"""
    flags, names = text.split(), ("step", "loss", "critic_loss", "penalty")
    train.main([*flags, "--steps", "3", "--out", str(tmp_path / "whole")])
    train.main([*flags, "--steps", "1", "--out", str(tmp_path / "run")])
    train.main(["--resume", "--steps", "3", "--out", str(tmp_path / "run")])
    assert metrics(tmp_path / "run", names) == metrics(tmp_path / "whole", names)
    whole, resumed = (tmp_path / run / "generator.safetensors" for run in ("whole", "run"))
    assert whole.read_bytes() == resumed.read_bytes()
    config = Config.load(tmp_path / "run" / "config.json")
    assert (config.updates.optimizer, config.training.lr, config.critic.penalty_weight) == ("rmsprop", 1e-4, (10.0,))


def test_a_critic_s_file_is_not_needed_again(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint has all weights, so that a run may be resumed where the file is no longer, or elsewhere."""
    file, run = write_weights(tmp_path / "small.safetensors"), tmp_path / "run"
    text = f"""--method gan --critic vgg-small --data {pictures} --batch-size 4 --nz 8 --loader torch --log-every 1
        --checkpoint-every 2 --threads 1 --upsampling transposed --critic-weights {file}"""
    train.main([*text.split(), "--steps", "3", "--out", str(tmp_path / "whole")])
    train.main([*text.split(), "--steps", "2", "--out", str(run)])
    file.rename(moved := tmp_path / "moved.safetensors")
    again = tmp_path / "again"
    shutil.copytree(run, again)
    train.main(["--resume", "--steps", "3", "--out", str(run)])
    train.main(["--resume", "--steps", "3", "--out", str(again), "--critic-weights", str(moved)])
    for resumed in (run, again):
        assert same_run(resumed, tmp_path / "whole", ("step", "loss", "critic_loss"))
    assert Config.load(again / "config.json").critic.critic_weights == str(moved)
    resume = ["--resume", "--steps", "4", "--out", str(run), "--critic-weights", "imagenet"]
    assert "--critic-weights: the run was started with" in command(train.main, resume, capsys)[1]


def test_a_critic_that_began_without_a_file_gets_none() -> None:
    config = configuration("digits", {"method": "gan", "critic": "vgg-small", "batch_size": 3})
    with pytest.raises(InputError, match=r"was started with None, .* resumed with small\.safetensors"):
        config.resumed_with({"critic_weights": "small.safetensors"})


@pytest.mark.parametrize(
    ("network", "flag", "hint"),
    [("critic", "--critic-lr", "rate, in another"), ("generator", "--lr", "rate, its own or the critic's, in another")],
)
def test_a_network_that_diverges_is_named(
    network: str,
    flag: str,
    hint: str,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, loss = itertools.count(1), getattr(Scalar, f"{network}_loss")
    spoilt = lambda *given: loss(*given) * (math.nan if next(calls) == 2 else 1)  # noqa: E731
    monkeypatch.setattr(Scalar, f"{network}_loss", spoilt)
    text = f"""--method gan --game hinge --data {pictures} --batch-size 4 --nz 8 --steps 4
        --loader torch --checkpoint-every 1 --threads 1 --out {tmp_path / "run"}"""
    code, errors = command(train.main, text.split(), capsys)
    assert code == 2
    line = errors.splitlines()[-1]
    assert line.startswith(f"error: {flag}: the {network}'s loss became NaN or infinite at step 2; the last good ")
    assert "step_00000001.safetensors" in line
    assert hint in line


def test_what_diverged_first_is_found() -> None:
    """The critic takes its step first; one skipped step too many counts for the network that skipped."""
    bad, good = torch.tensor(math.nan), torch.tensor(1.0)

    def seen(*steps: dict[str, Tensor]) -> Divergence:
        divergence = Divergence(("generator", "critic"), torch.device("cpu"), 1, reference)
        for step in steps:
            none = {"skipped": torch.tensor(0.0), "critic_skipped": torch.tensor(0.0)}
            divergence.take_in({"loss": good, "critic_loss": good, **none, **step})
        return divergence

    assert seen({}, {}).found(2) is None
    assert seen({}, {"loss": bad}).found(2) == ("generator", "the generator's loss", 2)
    assert seen({}, {"loss": bad, "critic_loss": bad}).found(2) == ("critic", "the critic's loss", 2)
    assert seen({"loss": bad}, {"critic_loss": bad}).found(2) == ("generator", "the generator's loss", 1)
    skipping = {"critic_skipped": torch.tensor(1.0), "skipped": torch.tensor(0.0)}
    twice = seen(skipping, skipping)
    assert twice.found(2) == ("critic", "the critic's gradient, 2 times in a row,", 2)
    assert twice.totals() == {"critic_skipped_steps": 2}
    again = seen()
    again.load_state_dict(twice.state_dict(), 7)
    assert again.found(7) == ("critic", "the critic's gradient, 2 times in a row,", 7)


def test_a_network_that_took_no_step_did_not_diverge() -> None:
    """In a second phase, "loss" is that of the network which then learns."""
    bad, good, no = torch.tensor(math.nan), torch.tensor(1.0), torch.tensor(0.0)
    divergence = Divergence(("generator", "mapping"), torch.device("cpu"), 1, reference)
    divergence.take_in({"loss": good, "skipped": no})
    divergence.take_in({"loss": good, "mapping_loss": good, "mapping_skipped": no})
    assert divergence.found(2) is None
    divergence.take_in({"loss": bad, "mapping_loss": bad, "mapping_skipped": no})
    assert divergence.found(3) == ("mapping", "the mapping's loss", 3)


GAN, MMD = ["--method", "gan"], ["--method", "mmd-gan"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([*GAN, "--penalty", "gradient", "--critic-norm", "batch"], "--critic-norm: --penalty gradient needs each"),
        (["--preset", "dcgan", "--penalty", "r1"], "--critic-norm: --penalty r1 needs each image's own derivative"),
        ([*MMD, "--scaled", "--critic-norm", "batch"], "--critic-norm: --penalty scaled needs each image's own"),
        ([*GAN, "--penalty", "r1", "--minibatch-discrimination"], "--minibatch-discrimination: --penalty r1 needs"),
        ([*GAN, "--penalty", "clip", "--critic-norm", "spectral"], "--penalty: clip bounds weights that"),
        ([*GAN, "--penalty", "witness"], "--penalty: witness is of kernels: it belongs to --method mmd-gan"),
        ([*GAN, "--penalty", "autoencode"], "--penalty: autoencode needs a critic with a decoder"),
        ([*GAN, "--penalty", "r2"], "--penalty: 'r2' is not one of none, scaled, clip"),
        ([*GAN, "--penalty", "r1", "--penalty-weight", "1", "2"], "--penalty-weight: 2 given for 1 penalty"),
        ([*GAN, "--critic-outputs", "16"], "--critic-outputs: this game of --method gan needs 1, not 16"),
        (["--method", "improved-gan", "--classes", "3", "--critic-outputs", "1"], "--critic-outputs: this game of"),
        (["--method", "improved-gan", "--classes", "3"], "--classes: images has no labels; leave it out"),
        (["--method", "began", "--critic", "dcgan"], "--critic: autoencoder is that of --method began"),
        ([*GAN, "--critic", "autoencoder"], "--critic: autoencoder is that of --method began"),
        ([*GAN, "--critic", "encoder-decoder"], "--critic: encoder-decoder has a decoder, which learns by --penalty"),
        (["--method", "molm", "--critic", "encoder-decoder"], "--critic: encoder-decoder has a decoder, which learns"),
        ([*GAN, "--critic-weights", "none.safetensors"], "--critic-weights: --critic dcgan has none to start from"),
        ([*GAN, "--critic", "resnet", "--critic-weights", "imagenet"], "--critic-weights: --critic resnet has none"),
        ([*MMD, "--kernel", "distance", "--scaled"], "--kernel: distance has a kink"),
        ([*MMD, "--scaled", "--estimate", "root"], "--estimate: a scaled MMD is a scaled MMD²"),
        (["--method", "mcgan", "--match", "covariance", "--match-directions", "99"], "--match-directions: 99 are more"),
        ([*GAN, "--kernel", "rbf"], "--kernel: belongs to --method mmd-gan, and this is --method gan"),
        (["--preset", "sngan", "--method", "mmd"], "--method: the preset sngan is one of --method gan"),
        ([*GAN, "--extractor", "vgg19"], "--extractor: belongs to the methods that compare features"),
        (["--critic-steps", "5"], "--critic-steps: belongs to --method gan or mmd-gan"),
        ([*GAN, "--batch-size", "64"], "--batch-size: 64 is more than the"),
        ([*GAN, "--critic", "resnet9"], "--critic: 'resnet9' is not known"),
        ([*GAN, "--optimizer", "rmsprop", "--weight-decay", "1"], "--weight-decay: --optimizer rmsprop has none"),
        ([*GAN, "--critic-many", "9"], "--critic-many: needs --critic-warmup or --critic-every"),
        (["--method", "mcgan", "--match-directions", "4"], "--match-directions: needs --match covariance"),
        (["--method", "mcgan", "--match", "covariance", "--match-norm", "1"], "--match-norm: needs --match mean"),
        ([*GAN, "--optimizer", "rmsprop", "--critic-beta1", "0"], "--critic-beta1: --"),
        ([*GAN, "--optimizer", "rmsprop", "--beta1", "0"], "--beta1: --"),
        (
            [*GAN, "--optimizer", "rmsprop", "--critic-optimizer", "adam", "--critic-beta1", "0", "--beta1", ".3"],
            "--beta1: --optimizer rmsprop has none",
        ),
        ([*GAN, "--critic-optimizer", "adam", "--weight-decay", "1"], "--weight-decay: --optimizer adam has none"),
    ],
)
def test_bad_input_is_one_line(
    given: list[str], line: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refusal(given, pictures, tmp_path / "run", capsys)


def test_a_plan_does_not_need_the_critic_s_weights(capsys: pytest.CaptureFixture[str]) -> None:
    text = "--method gan --critic vgg-small --critic-weights none.safetensors --batch-size 4 --nz 4 --plan"
    train.main(text.split())
    assert "peak (modelled)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "captured"),
    [
        ({"method": "mcgan"}, True),
        ({"method": "mcgan", "match": "covariance"}, False),
        ({"method": "improved-gan"}, True),
        ({"method": "improved-gan", "classes": 10}, False),
        ({"method": "gan", "critic_every": 9}, False),
    ],
    ids=str,
)
def test_settings_and_method_agree_on_what_can_be_captured(given: dict[str, Any], captured: bool) -> None:
    config = Config.build("digits", {**given, "nz": 4})
    known = of_images(config, few_pictures(config))
    method = make_method(config, make_generator(config), networks=make_networks(config), **known)
    assert (config.needs.captured, method.capturable) == (captured, captured)


def test_a_target_is_none_of_theirs(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "sngan", "--data", str(pictures), "--out", str(tmp_path / "target.safetensors")]
    code, errors = command(precompute.main, flags, capsys)
    assert (code, "--method: gan compares with no target" in errors.splitlines()[-1]) == (2, True)


@pytest.mark.parametrize("preset", ["mmd-gan-rbf", "sngan", "cr-gan", "dfm"])
def test_ranks_take_the_steps_of_one_process(preset: str) -> None:
    """With the recipe's own networks: spectral vectors, a decoder, BatchNorm over all ranks; shares of 3 and 2."""
    # Adam moves by ±lr a weight whose gradient is 0 but for rounding, as a bias before BatchNorm: that must be nothing.
    small = {"lr": 1e-7, "generator": "dcgan", "critic_steps": 2}
    config = configuration(preset, small | ({"denoiser_width": 8, "denoiser_layers": 2} if preset == "dfm" else {}))

    def work(ranks: Ranks) -> dict[str, Tensor]:
        with drawn_from(0):
            trainer = small_trainer(config, ranks)
        found = {f"{step}.{name}": value.clone() for step in range(2) for name, value in trainer.train_step().items()}
        weights = trainer.method.modules.named_parameters()
        gradients = {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}
        vectors = {name: kept for name, kept in trainer.method.modules.state_dict().items() if name.endswith(".u")}
        return {**found, **gradients, **vectors}

    (expected,) = on_ranks(1, work)
    assert any(name.endswith(".u") for name in expected) == (preset in ("sngan", "cr-gan"))
    for found in on_ranks(2, work):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float((found[name] - value).norm()) <= 1e-5 * float(value.norm()) + 2e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["wgan-gp", "mmd-gan-rq", "fisher-gan"])
def test_two_processes_train_the_run_of_one(preset: str, pictures: Path, tmp_path: Path) -> None:
    """In float32; test_adversarial.py has the same in float64."""
    text = f"""--preset {preset} --data {pictures} --batch-size 5 --nz 8 --generator dcgan --critic dcgan --loader torch
        --critic-steps 2 --steps 3 --log-every 1 --threads 1 --device cpu --lr 1e-5"""
    names = ("step", "loss", "critic_loss")
    train.main([*text.split(), "--out", str(tmp_path / "one")])
    for status, errors in ends(start_job(2, ["-m", "engine.train", *text.split(), "--out", str(tmp_path / "two")])):
        assert status == 0, errors
    for ours, theirs in zip(metrics(tmp_path / "two", names), metrics(tmp_path / "one", names), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
