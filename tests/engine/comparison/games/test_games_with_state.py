"""BEGAN's k and Fisher's Λ against their recursions written out, and saved and loaded."""

from __future__ import annotations

import math

import pytest
import torch
from test_games import outputs

from engine.comparison.games import Began, Fisher
from engine.comparison.games.began import began_balance, began_convergence
from engine.comparison.games.fisher import fisher_distance, fisher_moment


def test_k_follows_its_recursion_and_stays_between_0_and_1() -> None:
    game, k = Began(gamma=0.6, rate=0.4), 0.0
    seen = []
    for step in range(40):
        # Two phases: first generated images are the easier ones, then the harder ones.
        real, fake = outputs(5, 1, step).abs(), outputs(3, 1, 100 + step).abs() * (0.1 if step < 20 else 2)
        losses = [[float(one) for one in half[:, 0]] for half in (real, fake)]
        of_real, of_fake = (sum(half) / len(half) for half in losses)
        assert game.critic_loss(real, fake).item() == pytest.approx(of_real - k * of_fake, rel=1e-12)
        figures = game.figures(real, fake, game.critic_loss(real, fake))
        assert figures["k"].item() == pytest.approx(k, rel=1e-12)
        assert figures["distance"].item() == pytest.approx(of_real + abs(0.6 * of_real - of_fake), rel=1e-12)
        assert began_balance(real, fake, 0.6).item() == pytest.approx(0.6 * of_real - of_fake, rel=1e-12)
        game.update_(real, fake)
        k = min(1.0, max(0.0, k + 0.4 * (0.6 * of_real - of_fake)))
        assert game.k.item() == pytest.approx(k, rel=1e-12, abs=1e-15)
        seen.append(k)
    assert max(seen) == 1  # both limits are met, and values between them
    assert seen[-1] == 0
    assert any(0 < one < 1 for one in seen)


def test_multiplier_follows_its_recursion() -> None:
    """Λ falls while the critic's second moment is too small, and rises while it is too large."""
    game, multiplier = Fisher(rho=0.05), 0.0
    seen = []
    for step in range(30):
        scale = 0.1 if step < 10 else 1
        real, fake = scale * outputs(5, 1, step), scale * outputs(3, 1, 100 + step)
        omega = sum(float(one) ** 2 for one in real[:, 0]) / 10 + sum(float(one) ** 2 for one in fake[:, 0]) / 6
        gap = sum(float(one) for one in real[:, 0]) / 5 - sum(float(one) for one in fake[:, 0]) / 3
        value = gap + multiplier * (1 - omega) - 0.05 / 2 * (omega - 1) ** 2
        assert game.critic_loss(real, fake).item() == pytest.approx(-value, rel=1e-12)
        figures = game.figures(real, fake, game.critic_loss(real, fake))
        assert figures["moment"].item() == pytest.approx(omega, rel=1e-12)
        assert figures["multiplier"].item() == pytest.approx(multiplier, rel=1e-12, abs=1e-15)
        assert figures["distance"].item() == pytest.approx(gap / math.sqrt(omega), rel=1e-12)
        game.update_(real, fake)
        multiplier -= 0.05 * (1 - omega)
        seen.append(multiplier)
    assert game.multiplier.item() == pytest.approx(multiplier, rel=1e-12)
    assert seen[9] < seen[0] < 0
    assert seen[-1] > 0


@pytest.mark.parametrize("make", [Began, Fisher])
def test_state_is_saved_and_loaded_bit_for_bit(make: type[Began | Fisher]) -> None:
    game = make()
    for step in range(7):
        game.update_(outputs(5, 1, step).abs().float(), outputs(3, 1, 50 + step).float() / 8)
    (name,) = game.state_dict()
    state = {name: game.state_dict()[name].clone()}
    assert state[name].dtype == torch.float64
    assert state[name].item() != 0
    other = make()
    other.load_state_dict(state)
    for one in (game, other):
        one.update_(outputs(4, 1, 9), outputs(4, 1, 10))
    assert torch.equal(game.state_dict()[name], other.state_dict()[name])
    assert not torch.equal(game.state_dict()[name], state[name])


@pytest.mark.parametrize("make", [Began, Fisher])
def test_update_may_come_before_backward(make: type[Began | Fisher]) -> None:
    """The state changes in place, and the graph of the loss before it doesn't see that."""
    game = make(rate=0.5) if make is Began else make(rho=0.5)
    real, fake = outputs(4, 1, 1).abs().requires_grad_(), (outputs(4, 1, 2) / 9).requires_grad_()
    game.update_(real, fake)
    place = next(game.buffers()).data_ptr()
    before = torch.autograd.grad(game.critic_loss(real, fake), (real, fake))
    loss = game.critic_loss(real, fake)
    game.update_(real, fake)
    torch.testing.assert_close(torch.autograd.grad(loss, (real, fake)), before, rtol=0, atol=0)
    after = torch.autograd.grad(game.critic_loss(real, fake), (real, fake))
    assert not torch.equal(after[1], before[1])
    assert next(game.buffers()).data_ptr() == place
    assert not next(game.buffers()).requires_grad


def test_distances_where_there_is_nothing_to_divide_by() -> None:
    zero = torch.zeros(3, 1)
    assert fisher_distance(zero, zero).item() == 0
    assert fisher_moment(zero, zero).item() == 0
    assert began_convergence(zero, zero, 0.5).item() == 0
