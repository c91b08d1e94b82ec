"""Adversarial runs from outside: resumed bit for bit, divergence by name, one line for what makes no sense."""

from __future__ import annotations

import functools
import itertools
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.jobs import ends, start_job
from helpers.runs import command, metrics, refusal
from helpers.small_steps import configuration, few_pictures, resumed_equals_whole
from torch import Tensor

from engine import precompute, train
from engine.comparison.games.adversarial import Scalar
from engine.comparison.games.penalties import Play
from engine.configuration.adversarial import is_unbounded, penalty_names
from engine.configuration.build import make_generator, make_method, make_networks, of_images
from engine.configuration.config import Config
from engine.configuration.critics import make_adversarial, make_critics, make_penalties
from engine.configuration.methods import ADVERSARIAL
from engine.configuration.presets import PRESETS, preset_method
from engine.configuration.train_command import train_command
from engine.support.errors import InputError
from engine.training.divergence import Divergence
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


@pytest.mark.parametrize(
    "name", [name if name == "all at once" else pytest.param(name, marks=pytest.mark.slow) for name in RESUMED]
)
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
        ([*GAN, "--penalty", "autoencode"], "--penalty: autoencode needs a critic that draws images again"),
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


def test_recipes_are_short_on_the_digits_alone() -> None:
    digits, own = Config.build("sngan", {}), Config.build("sngan", {"data": "photos/"})
    assert (digits.data.dataset, digits.training.steps < 2000, digits.updates.lr_schedule) == (
        "digits",
        True,
        "constant",
    )
    assert (own.data.dataset, own.training.steps, own.updates.lr_schedule) == ("images", 100_000, "linear")
    assert (own.training.beta1, own.critic.critic_steps, own.critic.critic_norm) == (0.0, 5, "spectral")
    assert Config.build("sngan", {"dataset": "cifar10"}).training.steps == 100_000


def test_another_penalty_has_its_own_weight() -> None:
    assert Config.build("wgan", {"penalty": ["consistency"]}).critic.penalty_weight == ()
    assert Config.build("wgan", {}).critic.penalty_weight == (0.01,)
    assert Config.build("wgan", {}).replaced(
        {"penalty": ["consistency"], "penalty_weight": [3]}
    ).critic.penalty_weight == (3.0,)
    with pytest.raises(InputError, match="2 given for 1 penalty"):
        Config.build("mmd-gan-rq", {"penalty": ["witness"], "penalty_weight": [1, 1]})


def test_the_same_penalty_and_kernel_keep_their_numbers() -> None:
    """Whoever resumes a run may say once more what it is."""
    run = Config.build("smmd", {"penalty": ["witness"], "penalty_weight": [3]})
    again = run.resumed_with({"penalty": ["witness"], "kernel": "rbf"})
    assert again == run
    assert (again.critic.penalty_weight, again.game.kernel_bandwidths) == ((3.0,), (1.0,))
    assert Config.build("wgan", {"penalty": ["clip"]}).critic.penalty_weight == (0.01,)


def test_another_run_s_chunk_and_queue_are_no_hindrance() -> None:
    """Its config.json has them, and no flag of these methods could take them away."""
    queue = {"population": "queue", "population_images": 64}
    run = Config.build("digits", {"batch_size": 64, "chunk_size": 32, **queue})
    assert run.replaced({"method": "gan", "batch_size": 16}).training.batch_size == 16
    assert run.replaced({"method": "mmd", "batch_size": 128}).training.batch_size == 128
    with pytest.raises(InputError, match="population_images: is smaller than the minibatch: 64 < 128"):
        run.replaced({"method": "frechet", "batch_size": 128})
    with pytest.raises(InputError, match="chunk_size: is larger than the minibatch: 32 > 16"):
        run.replaced({"method": "mmd", "batch_size": 16})


def test_help_says_whose_a_flag_is() -> None:
    text = " ".join(train.parser().format_help().split())
    assert "(default: nonsaturating; only with --method gan)" in text
    assert "(default: vgg-small; only with the methods that compare features)" in text


@pytest.mark.parametrize("method", ["mmd-gan", "gfmn"])
def test_a_recipe_is_of_one_method(method: str) -> None:
    """Also where a run's config.json names it."""
    for made in (Config.build("wgan", {}).replaced, functools.partial(Config.build, "wgan")):
        with pytest.raises(InputError, match=f"is one of --method gan, and this is --method {method}"):
            made({"method": method})
    assert Config.build("digits", {}).replaced({"method": "gan"}).usual().method.method == "gan"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"method": "gan", "critic_many": 7}, "critic_many"),
        ({"method": "gan", "optimizer": "rmsprop", "beta1": 0.1}, "beta1"),
        ({"method": "gan", "optimizer": "rmsprop", "critic_optimizer": "adam", "beta2": 0.9}, None),
        ({"method": "gan", "critic_optimizer": "rmsprop", "beta2": 0.9}, None),
        ({"method": "gan", "critic_optimizer": "rmsprop", "critic_beta2": 0.9}, "critic_beta2"),
        ({"method": "gan", "optimizer": "rmsprop", "critic_beta1": 0.1}, "critic_beta1"),
        ({"optimizer": "rmsprop", "beta1": 0.1}, "beta1"),
        ({"method": "mcgan", "match": "covariance", "match_norm": "1"}, "match_norm"),
        ({"method": "mcgan", "match_directions": 4}, "match_directions"),
        ({"method": "mcgan", "match": "covariance", "match_directions": 4, "critic_warmup": 1, "critic_many": 7}, None),
    ],
)
def test_a_flag_that_decides_nothing_is_refused(given: dict[str, Any], name: str | None) -> None:
    if name is None:
        Config.build("digits", given)
        return
    with pytest.raises(InputError) as refused:
        Config.build("digits", given)
    assert refused.value.argument == name


def test_the_same_penalty_and_kernel_keep_their_numbers_in_a_resumed_run() -> None:
    given = {"method": "mmd-gan", "kernel": "rbf", "kernel_bandwidths": [3], "penalty": ["scaled"]}
    config = Config.build("digits", {**given, "penalty_weight": [5]})
    assert config.resumed_with({"kernel": "rbf", "penalty": ["scaled"]}) == config
    short = Config.build("digits", {"method": "mmd-gan", "scaled": True, "penalty": ["activations"]})
    assert short.resumed_with({"scaled": True}) == short


def test_scaled_is_short_for_the_penalty() -> None:
    short = Config.build("digits", {"method": "mmd-gan", "scaled": True})
    assert penalty_names(short) == ("scaled",)
    both = Config.build("digits", {"method": "mmd-gan", "scaled": True, "penalty": ["activations"]})
    assert penalty_names(both) == ("scaled", "activations")


WASSERSTEIN: dict[str, Any] = {"method": "gan", "game": "wasserstein"}


@pytest.mark.parametrize(
    ("given", "unbounded"),
    [
        (WASSERSTEIN, True),
        ({**WASSERSTEIN, "critic_norm": "batch"}, True),
        ({**WASSERSTEIN, "penalty": ["consistency"]}, True),
        ({**WASSERSTEIN, "penalty": ["clip"]}, False),
        ({**WASSERSTEIN, "critic_norm": "spectral"}, False),
        ({"method": "gan", "game": "hinge"}, False),
        ({"method": "mcgan"}, False),
        ({"method": "mcgan", "penalty": ["none"]}, True),
        ({"method": "mmd-gan", "kernel": "linear"}, False),
        ({"method": "mmd-gan", "kernel": "linear", "penalty": ["activations"]}, True),
        ({"method": "mmd-gan", "kernel": "linear", "penalty": ["none"], "scaled": True}, False),
        ({"method": "mmd-gan", "kernel": "rbf", "penalty": ["none"]}, False),
        ({"method": "fisher-gan"}, False),
    ],
)
def test_a_critic_without_bounds_is_warned_of(
    given: dict[str, Any], unbounded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = configuration("digits", given)
    generator = make_generator(config)
    make_adversarial(config, generator, make_critics(config))
    assert ("nothing bounds this critic" in caplog.text) == unbounded


def test_every_recipe_bounds_its_critic() -> None:
    of_critics = [name for name in PRESETS if preset_method(name) in ADVERSARIAL]
    assert {"wgan", "mcgan", "mmd-gan-rq"} <= set(of_critics)
    assert not [name for name in of_critics if is_unbounded(Config.build(name, {}))]


@pytest.mark.parametrize("preset", ["smmd", "sn-smmd"])
def test_the_scale_is_the_published_one(preset: str) -> None:
    """1 + 10 E ‖∇φ‖² for φ(x) = the mean of x, whose squared derivative is 1/pixels."""
    (penalty,) = make_penalties(Config.build(preset, {}))
    images = torch.zeros(2, 3, 2, 2)
    mean = lambda x: x.mean(dim=(1, 2, 3))[:, None]  # noqa: E731
    play = Play(mean, images, images, mean(images), mean(images), lambda columns: torch.zeros(2, columns))
    assert float(penalty.applied(torch.tensor(1.0), penalty.terms(play))) == pytest.approx(1 / (1 + 10 / 12))


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        ("sngan", {"data": "photos", "steps": 250}),
        ("sngan", {"steps": 300, "critic_lr": 3e-4}),
        ("digits", {"method": "mmd-gan", "scaled": True, "kernel": "rq*"}),
        ("wgan", {"dataset": "cifar10"}),
        ("wgan", {"penalty": ["consistency"], "penalty_weight": [0.01]}),
        ("mmd-gan-rq", {"penalty": ["witness"]}),
        ("mmd-gan-rq", {"scaled": True, "penalty": ["witness", "activations"], "penalty_weight": [1, 1]}),
    ],
)
def test_the_command_line_repeats_the_run(preset: str, given: dict[str, Any]) -> None:
    """With the same data the preset's values are others than on the digits."""
    config = Config.build(preset, given)
    words = shlex.split(train_command(config))
    arguments = train.parser().parse_args(words[words.index("engine.train") + 1 :])
    assert train.configure(arguments) == config


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
