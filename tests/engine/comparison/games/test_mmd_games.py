"""MMD games against sums over all pairs, finite differences, and known answers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.kernel_pairs import PAIRS
from torch import Tensor

from engine.comparison.distances import kernels
from engine.comparison.games import GAMES
from engine.comparison.games.mmd import MMDGame, RootMMDGame, one_sided
from engine.support.errors import InputError

SIZES = [(2, 2, 1), (3, 5, 4), (7, 4, 16)]


def outputs(n: int, m: int, size: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(n + m)
    real = torch.randn(n, size, generator=random, dtype=torch.float64)
    fake = torch.randn(m, size, generator=random, dtype=torch.float64) + 0.5
    return real.requires_grad_(), fake.requires_grad_()


def enumerated(name: str, x: Tensor, y: Tensor, unbiased: bool) -> Tensor:
    """MMD² as a sum over all pairs, one after the other."""
    pair = PAIRS[name][1]

    def within(z: Tensor) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for i in range(len(z)):
            for j in range(len(z)):
                if not (unbiased and i == j):
                    total, count = total + pair(z[i], z[j]), count + 1
        return total / count

    across = torch.zeros((), dtype=torch.float64)
    for one in x:
        for other in y:
            across = across + pair(one, other)
    return within(x) + within(y) - 2 * across / (len(x) * len(y))


def same(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Values and gradients to 1e-10."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value * 1.7, inputs, retain_graph=True) for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_unbiased_game_is_the_sum_over_pairs(name: str, sizes: tuple[int, int, int]) -> None:
    real, fake = outputs(*sizes)
    game = GAMES["mmd"](PAIRS[name][0])
    same(game.generator_loss(real, fake), enumerated(name, real, fake, True), real, fake)
    same(game.critic_loss(real, fake), -enumerated(name, real, fake, True), real, fake)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_root_game_is_the_sum_over_pairs(name: str, sizes: tuple[int, int, int]) -> None:
    real, fake = outputs(*sizes)
    game = GAMES["root-mmd"](PAIRS[name][0])
    sided = torch.stack([torch.clamp(real[:, f].mean() - fake[:, f].mean(), max=0) for f in range(sizes[2])]).mean()
    expected = torch.sqrt(enumerated(name, real, fake, False) + 1e-6) + 16 * sided
    same(game.generator_loss(real, fake), expected, real, fake)
    same(game.critic_loss(real, fake), -expected, real, fake)


@pytest.mark.parametrize("name", ["mmd", "root-mmd"])
def test_games_can_be_differentiated_twice(name: str) -> None:
    game = GAMES[name]()
    assert torch.autograd.gradgradcheck(game.critic_loss, outputs(3, 2, 4))


@pytest.mark.parametrize("name", PAIRS)
def test_the_root_is_smooth_where_the_sets_are_alike(name: str) -> None:
    """At the optimum, and where rounding makes MMD² negative."""
    game = RootMMDGame(PAIRS[name][0])
    for dtype in (torch.float32, torch.float64):
        real = (torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(dtype) + 3).requires_grad_()
        fake = real.detach().flip(0).requires_grad_()
        loss = game.generator_loss(real, fake)
        low, high = (0.999e-3, 6e-3) if dtype == torch.float32 else (1e-3 - 1e-8, 1e-3 + 1e-8)
        assert low <= loss.item() <= high  # √ of the floor
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (real, fake)))


def test_what_rounding_makes_negative_counts_as_zero() -> None:
    """A kernel with the wrong sign has MMD² = −‖E x − E y‖²."""
    game = RootMMDGame(lambda x, y: -(x @ y.T), one_sided_weight=0.0)
    real, fake = outputs(4, 5, 3)
    loss = game.generator_loss(real, fake)
    assert loss.item() == pytest.approx(1e-3, rel=1e-12)
    assert not torch.autograd.grad(loss, fake)[0].any()


def test_one_sided_term_counts_what_is_larger_on_generated_images() -> None:
    real, fake = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[5.0, 0.5]])
    assert one_sided(real, fake) == pytest.approx((2.0 - 5.0) / 2)
    assert RootMMDGame(kernels.linear(), one_sided_weight=0.0, floor=1e-12).generator_loss(real, fake) == pytest.approx(
        math.hypot(3.0, 0.5)
    )


def test_distance_is_logged_without_a_graph() -> None:
    real, fake = outputs(4, 5, 3)
    for game, unbiased in ((MMDGame(), True), (RootMMDGame(PAIRS["gaussian"][0]), False)):
        name = "rational-quadratic" if unbiased else "gaussian"
        expected = enumerated(name, real, fake, unbiased)
        found = game.figures(real, fake, game.critic_loss(real, fake).detach())["distance"]
        assert not found.requires_grad
        torch.testing.assert_close(found, expected if unbiased else (expected + 1e-6).sqrt())
        assert game.outputs is None
        assert game.reads_real
        assert game.state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    real, fake = (tensor.detach().to(dtype) for tensor in outputs(4, 5, 3))
    for game in (MMDGame(), RootMMDGame()):
        found = game.critic_loss(real, fake)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, game.critic_loss(real.double(), fake.double()).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"one_sided_weight": -1.0}, "one_sided_weight"),
        ({"one_sided_weight": math.nan}, "one_sided_weight"),
        ({"floor": 0.0}, "floor"),
        ({"floor": math.inf}, "floor"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], argument: str) -> None:
    with pytest.raises(InputError) as error:
        RootMMDGame(**settings)
    assert error.value.argument == argument


def test_outputs_that_do_not_fit_are_refused() -> None:
    real, fake = outputs(3, 2, 2)
    for game, pairs in (
        (MMDGame(), {"real": (real[:1], fake), "fake": (real, fake[:1])}),
        (RootMMDGame(), {"real": (real[0], fake), "fake": (real, fake[:, :1])}),
    ):
        for argument, pair in pairs.items():
            with pytest.raises(InputError) as error:
                game.critic_loss(*pair)
            assert error.value.argument == argument
