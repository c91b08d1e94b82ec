"""Every game's losses and gradients against its formula written out an output at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.comparison.games import GAMES, FeatureMatching, Game
from engine.comparison.games.adversarial import (
    boundary_seeking_generator,
    hinge_critic,
    least_squares_critic,
    least_squares_generator,
    minimax_critic,
    minimax_generator,
    nonsaturating_generator,
    wasserstein_critic,
    wasserstein_generator,
)
from engine.comparison.games.protocols import Stateless
from engine.support.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]


def mean(terms: list[Tensor]) -> Tensor:
    return sum(terms, torch.zeros((), dtype=torch.float64)) / len(terms)


def probability(logit: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-logit))


def minimax_value(x: Tensor, g: Tensor) -> Tensor:
    """−E log D(x) − E log(1 − D(G)), as Goodfellow writes it."""
    return -mean([torch.log(probability(one)) for one in x[:, 0]]) - mean(
        [torch.log(1 - probability(one)) for one in g[:, 0]]
    )


def saturating(x: Tensor, g: Tensor) -> Tensor:
    return mean([torch.log(1 - probability(one)) for one in g[:, 0]])


def not_saturating(x: Tensor, g: Tensor) -> Tensor:
    return -mean([torch.log(probability(one)) for one in g[:, 0]])


def boundary(x: Tensor, g: Tensor) -> Tensor:
    return mean([(torch.log(probability(one)) - torch.log(1 - probability(one))) ** 2 for one in g[:, 0]]) / 2


def squares(x: Tensor, g: Tensor) -> Tensor:
    return mean([(one - 1) ** 2 for one in x[:, 0]]) / 2 + mean([one**2 for one in g[:, 0]]) / 2


def squares_of_fake(x: Tensor, g: Tensor) -> Tensor:
    return mean([(one - 1) ** 2 for one in g[:, 0]]) / 2


def hinges(x: Tensor, g: Tensor) -> Tensor:
    """Minus V of Miyato's equation 16, with the min's of the paper."""
    zero = torch.zeros((), dtype=torch.float64)
    return -mean([one - 1 if one < 1 else zero for one in x[:, 0]]) - mean(
        [-1 - one if one > -1 else zero for one in g[:, 0]]
    )


def difference(x: Tensor, g: Tensor) -> Tensor:
    return mean(list(g[:, 0])) - mean(list(x[:, 0]))


def minus_fake(x: Tensor, g: Tensor) -> Tensor:
    return -mean(list(g[:, 0]))


def reconstruction(x: Tensor, g: Tensor) -> Tensor:
    return mean(list(x[:, 0])) - 0.3 * mean(list(g[:, 0]))


def reconstruction_of_fake(x: Tensor, g: Tensor) -> Tensor:
    return mean(list(g[:, 0]))


def lagrangian(x: Tensor, g: Tensor) -> Tensor:
    omega = (mean([one**2 for one in x[:, 0]]) + mean([one**2 for one in g[:, 0]])) / 2
    value = mean(list(x[:, 0])) - mean(list(g[:, 0])) + 0.7 * (1 - omega) - 0.2 / 2 * (omega - 1) ** 2
    return -value


def gaps(x: Tensor, g: Tensor) -> list[Tensor]:
    return [mean(list(x[:, i])) - mean(list(g[:, i])) for i in range(x.shape[1])]


def norm(order: float) -> Loss:
    def of(x: Tensor, g: Tensor) -> Tensor:
        found = [gap if gap > 0 else -gap for gap in gaps(x, g)]
        if order == math.inf:
            return max(found)
        return mean([gap**order for gap in found]).mul(len(found)) ** (1 / order)

    return of


def minus(loss: Loss) -> Loss:
    return lambda x, g: -loss(x, g)


def squared_gaps(x: Tensor, g: Tensor) -> Tensor:
    return mean([gap**2 for gap in gaps(x, g)]) * x.shape[1]


LABELS = (0, 2, -1, 1, 2, 0, -1)


def classes(x: Tensor, g: Tensor) -> Tensor:
    """k+1 classes as a table of probabilities, the last one "generated" with logit 0."""

    def table(rows: Tensor) -> list[list[Tensor]]:
        one = torch.ones((), dtype=torch.float64)
        weights = [[*(torch.exp(logit) for logit in row), one] for row in rows]
        return [[weight / sum(row) for weight in row] for row in weights]

    real, fake = table(x), table(g)
    known = [
        -torch.log(row[label] / sum(row[:-1])) for row, label in zip(real, LABELS[: len(x)], strict=True) if label >= 0
    ]
    return mean(known) - mean([torch.log(1 - row[-1]) for row in real]) - mean([torch.log(row[-1]) for row in fake])


class Labelled(Stateless):
    """The game of classes with its labels in, so that it can be called as the others are."""

    def __init__(self, game: FeatureMatching):
        self.game, self.outputs, self.reads_real = game, game.outputs, game.reads_real

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.game.critic_loss(real, fake, torch.tensor(LABELS[: len(real)], dtype=torch.int32))

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.game.generator_loss(real, fake)


@dataclass(frozen=True)
class Case:
    """A game, and its losses written out."""

    id: str
    make: Callable[[], Game]
    critic: Loss
    generator: Loss
    size: int = 1
    state: dict[str, float] = field(default_factory=dict)

    def game(self) -> Game:
        game = self.make()
        for name, value in self.state.items():
            getattr(game, name).fill_(value)
        return game


def named(name: str, *losses: Any, id: str | None = None, **settings: Any) -> Case:
    size, state = settings.pop("size", 1), settings.pop("state", {})
    return Case(id or name, lambda: GAMES[name](**settings), *losses, size=size, state=state)


CASES = [
    named("minimax", minimax_value, saturating),
    named("nonsaturating", minimax_value, not_saturating),
    named("boundary-seeking", minimax_value, boundary),
    named("least-squares", squares, squares_of_fake),
    named("hinge", hinges, minus_fake),
    named("wasserstein", difference, minus_fake),
    named("began", reconstruction, reconstruction_of_fake, state={"k": 0.3}),
    named("fisher", lagrangian, minus_fake, rho=0.2, state={"multiplier": 0.7}),
    *(
        named("mcgan-mean", minus(norm(order)), norm(order), id=f"mcgan-mean-{order}", size=5, order=order)
        for order in (1, 2, math.inf)
    ),
    named("feature-matching", minimax_value, squared_gaps),
    Case("classes", lambda: Labelled(FeatureMatching(classes=3)), classes, squared_gaps, size=3),
]
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def outputs(count: int, size: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(count, size, generator=random, dtype=torch.float64)


def test_every_game_is_written_out_here_or_beside() -> None:
    """`mcgan-covariance` has a file of its own, and so have those of MMD."""
    written = {case.id.rpartition("-")[0] if "mcgan" in case.id else case.id for case in CASES}
    assert set(GAMES) - written == {"mcgan-covariance", "mmd", "root-mmd"}


@CASE
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 5), (2, 11)])
def test_losses_and_gradients_are_the_formulas(case: Case, n: int, m: int) -> None:
    game, upstream = case.game(), torch.randn((), dtype=torch.float64)
    for ours, written in ((game.critic_loss, case.critic), (game.generator_loss, case.generator)):
        real, fake = outputs(n, case.size, 1).requires_grad_(), outputs(m, case.size, 2).requires_grad_()
        found, expected = ours(real, fake), written(real, fake)
        assert found.shape == ()
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        gradients = [
            torch.autograd.grad(loss, (real, fake), upstream, allow_unused=True, materialize_grads=True)
            for loss in (found, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@CASE
def test_derivatives_are_those_of_finite_differences(case: Case) -> None:
    game = case.game()
    pair = outputs(3, case.size, 3).requires_grad_(), outputs(4, case.size, 4).requires_grad_()
    for loss in (game.critic_loss, game.generator_loss):
        assert torch.autograd.gradcheck(loss, pair)
        # Losses that are linear in the outputs have no second derivative for autograd to find.
        curved = lambda x, g, loss=loss: loss(x, g) + 0.0 * (x**3).sum() + 0.0 * (g**3).sum()  # noqa: E731
        assert torch.autograd.gradgradcheck(curved, pair)


@CASE
def test_whether_the_generator_looks_at_real_images(case: Case) -> None:
    game = case.game()
    fake = outputs(4, case.size, 2)
    losses = {game.generator_loss(outputs(4, case.size, seed), fake).item() for seed in range(3)}
    assert (len(losses) > 1) == game.reads_real
    if not game.reads_real:
        assert losses == {game.generator_loss(fake, fake).item()}


@CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_outputs_are_finite(case: Case, dtype: torch.dtype) -> None:
    game = case.game()
    for high in (1e4, -1e4):
        real = torch.full((3, case.size), high, dtype=dtype, requires_grad=True)
        fake = torch.full((2, case.size), -high, dtype=dtype, requires_grad=True)
        for loss in (game.critic_loss(real, fake), game.generator_loss(real, fake)):
            gradients = torch.autograd.grad(loss, (real, fake), allow_unused=True, materialize_grads=True)
            assert loss.dtype == dtype
            assert all(bool(one.isfinite().all()) for one in (loss, *gradients))


SURE = [
    (minimax_critic, (1e4, -1e4), 0.0),
    (minimax_critic, (-1e4, 1e4), 2e4),
    (lambda x, g: minimax_generator(g), (0.0, 1e4), -1e4),
    (lambda x, g: nonsaturating_generator(g), (0.0, -1e4), 1e4),
    (lambda x, g: boundary_seeking_generator(g), (0.0, -1e4), 5e7),
    (least_squares_critic, (1.0, 1e4), 5e7),
    (lambda x, g: least_squares_generator(g), (0.0, 1.0), 0.0),
    (hinge_critic, (1e4, -1e4), 0.0),
    (hinge_critic, (-1e4, 1e4), 20002.0),
    (wasserstein_critic, (1e4, -1e4), -2e4),
    (lambda x, g: wasserstein_generator(g), (0.0, 1e4), -1e4),
]


@pytest.mark.parametrize(("loss", "at", "expected"), SURE)
def test_values_where_the_critic_is_sure(loss: Loss, at: tuple[float, float], expected: float) -> None:
    real, fake = (torch.full((3, 1), one) for one in at)
    assert loss(real, fake).item() == expected


@CASE
def test_half_precision_is_summed_in_float32(case: Case) -> None:
    game = case.game()
    real, fake = outputs(4000, case.size, 1).half(), outputs(3000, case.size, 2).half()
    if isinstance(game, Labelled):
        real = real[: len(LABELS)]
    for loss in (game.critic_loss, game.generator_loss):
        found = loss(real, fake)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(real.double(), fake.double()).float(), rtol=1e-5, atol=1e-5)


@CASE
def test_wrong_shapes_are_refused(case: Case) -> None:
    game, size = case.game(), case.size
    good = torch.zeros(3, size)
    wide = torch.zeros(3, size + 1)
    for fake in (wide, torch.zeros(0, size), torch.zeros(3), torch.zeros(3, size, dtype=torch.int64)):
        for loss in (game.critic_loss, game.generator_loss):
            with pytest.raises(InputError, match=r"^fake: expected real features [^\n]*$"):
                loss(good, fake)
    for real in (torch.zeros(0, size), torch.zeros(3), torch.zeros(3, size, 1)):
        with pytest.raises(InputError, match=r"^real: expected real features [^\n]*$"):
            game.critic_loss(real, good)
    if game.outputs is not None:
        with pytest.raises(InputError, match=rf"^real: expected real features \[n ≥ 1, {game.outputs}\], got \[3, "):
            game.critic_loss(wide, wide)


@CASE
def test_a_game_without_state_takes_no_other_games_state(case: Case) -> None:
    game = case.game()
    assert set(game.state_dict()) == set(case.state)
    game.load_state_dict(game.state_dict())
    with pytest.raises(InputError, match=r"^state_dict: is another game's: it has other"):
        game.load_state_dict({"other": torch.zeros(())})
    if case.state:
        with pytest.raises(InputError, match=r"^state_dict: is another game's: it has nothing, not "):
            game.load_state_dict({})
