"""Settings of adversarial runs: what recipes say, what goes with what, and what a command line repeats."""

from __future__ import annotations

import functools
import shlex
from typing import Any

import pytest
import torch
from helpers.small_steps import configuration

from engine import train
from engine.comparison.games.penalties import Play
from engine.configuration.adversarial import missing_bounds, penalty_names
from engine.configuration.config import Config
from engine.configuration.critics import make_penalties
from engine.configuration.methods import ADVERSARIAL
from engine.configuration.presets import PRESETS, preset_method
from engine.configuration.risks import risks
from engine.configuration.train_command import train_command
from engine.support.errors import InputError


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


PAPERS: dict[str, dict[str, Any]] = {
    "wgan": {"lr": 5e-5, "optimizer": "rmsprop", "critic_steps": 5, "penalty": ("clip",), "penalty_weight": (0.01,)},
    "wgan-gp": {"lr": 1e-4, "beta1": 0.5, "beta2": 0.9, "critic_steps": 5, "penalty_weight": (10.0,)},
    "sngan": {"lr": 2e-4, "beta1": 0.0, "beta2": 0.9, "critic_steps": 5, "nz": 128, "game": "hinge"},
    "r1": {"lr": 1e-4, "optimizer": "rmsprop", "penalty": ("r1",), "penalty_weight": (10.0,), "generator_ema": 0.999},
    "began": {"lr": 1e-4, "batch_size": 16, "began_gamma": 0.5, "began_rate": 1e-3, "nz": 64, "prior": "uniform"},
    "mmd-gan-rbf": {"lr": 5e-5, "penalty_weight": (0.01, 8.0), "estimate": "root", "critic_outputs": 128},
    "mmd-gan-rq": {"lr": 1e-4, "beta1": 0.5, "beta2": 0.9, "critic_steps": 5, "penalty_weight": (1.0, 1.0)},
    "smmd": {"lr": 1e-4, "critic_steps": 5, "critic_warmup": 20, "critic_every": 100, "critic_many": 10, "nz": 128},
    "fisher-gan": {"lr": 2e-4, "beta1": 0.5, "critic_steps": 2, "fisher_rho": 1e-6},
    "dfm": {"lr": 1e-4, "beta1": 0.5, "denoise_weight": 0.03, "denoiser_width": 1024, "denoiser_layers": 10},
}
"""What papers and their authors' code say, of images of one's own."""


@pytest.mark.parametrize("preset", PAPERS)
def test_presets_are_the_papers(preset: str) -> None:
    values = Config.build(preset, {"dataset": "cifar10"}).flat()
    assert {name: values[name] for name in PAPERS[preset]} == PAPERS[preset]


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


@pytest.mark.parametrize(
    ("given", "change", "kept"),
    [
        ({"method": "mmd", "mmd_kernel": "gaussian", "mmd_bandwidths": [1]}, {"mmd_kernel": "linear"}, {}),
        (
            {"method": "mmd", "mmd_kernel": "polynomial", "mmd_degree": 4},
            {"mmd_kernel": "imq", "mmd_bandwidths": [2]},
            {"mmd_degree": 3, "mmd_bandwidths": (2.0,)},
        ),
        ({"population": "ema", "population_decay": 0.5}, {"population": "none"}, {"population_decay": 0.9}),
        ({"population": "queue", "population_images": 128}, {"population": "ema"}, {"population_images": 640}),
        ({"lr_schedule": "cosine", "lr_final": 1e-5}, {"lr_schedule": "constant"}, {"lr_final": 0.0}),
        ({"lr_schedule": "cosine", "lr_final": 1e-5}, {"lr_schedule": "linear"}, {"lr_final": 1e-5}),
        ({"optimizer": "adamw", "weight_decay": 0.1}, {"optimizer": "adam"}, {"weight_decay": None}),
        (
            {"method": "gan", "optimizer": "adamw", "critic_optimizer": "adamw", "weight_decay": 0.1},
            {"optimizer": "adam"},
            {"weight_decay": 0.1},
        ),
        (
            {"method": "gan", "optimizer": "adam", "critic_optimizer": "adamw", "weight_decay": 0.1},
            {"critic_optimizer": "adam"},
            {"weight_decay": None},
        ),
    ],
    ids=str,
)
def test_another_choice_has_its_own_numbers(given, change, kept) -> None:
    """A run's config.json has those of the one, and no flag could take them away."""
    flat = Config.build("digits", given).replaced(change).flat()
    assert {name: flat[name] for name in kept} == kept


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
        ({**WASSERSTEIN, "penalty": ["r1"]}, False),
        ({"method": "mcgan", "penalty": ["none"], "critic_norm": "spectral"}, False),
        # Second moments grow with a bias of the outputs, and cubes faster than the square of a slope.
        ({"method": "mcgan", "match": "covariance", "penalty": ["none"], "critic_norm": "spectral"}, True),
        ({"method": "mcgan", "match": "covariance"}, False),
        ({"method": "mmd-gan", "kernel": "polynomial", "penalty": ["gradient"]}, True),
        ({"method": "mmd-gan", "kernel": "polynomial", "penalty": ["witness"]}, False),
        ({"method": "mcgan"}, False),
        ({"method": "mcgan", "penalty": ["none"]}, True),
        ({"method": "mmd-gan", "kernel": "linear"}, False),
        ({"method": "mmd-gan", "kernel": "linear", "penalty": ["activations"]}, True),
        ({"method": "mmd-gan", "kernel": "linear", "penalty": ["none"], "scaled": True}, False),
        ({"method": "mmd-gan", "kernel": "rbf", "penalty": ["none"]}, False),
        ({"method": "fisher-gan"}, False),
    ],
)
def test_a_critic_without_bounds_is_a_risk(given: dict[str, Any], unbounded: bool) -> None:
    found = risks(configuration("digits", given), 1797)
    assert any("nothing bounds this critic" in line for line in found) == unbounded


def test_every_recipe_bounds_its_critic() -> None:
    of_critics = [name for name in PRESETS if preset_method(name) in ADVERSARIAL]
    assert {"wgan", "mcgan", "mmd-gan-rq"} <= set(of_critics)
    assert not [name for name in of_critics if missing_bounds(Config.build(name, {}))]


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
