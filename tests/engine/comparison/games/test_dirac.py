"""Known answers where generator and critic have one number each: images θ, D(x) = ψx (Mescheder et al. 2018)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.comparison.distances import kernels
from engine.comparison.games import GAMES, Game
from engine.comparison.games.penalties import PENALTIES, Penalty, Play


class Line(nn.Module):
    """D(x) = ψ x of images [n, 1, 1, 1]."""

    def __init__(self, psi: Tensor):
        super().__init__()
        self.psi = nn.Parameter(psi) if not psi.requires_grad else psi

    def forward(self, images: Tensor) -> Tensor:
        return self.psi * images.flatten(1)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def play_at(theta: Tensor, psi: Tensor, count: int = 1) -> Play:
    """All real images are 0, all generated ones θ."""
    critic = Line(psi)
    fake = theta.expand(count, 1, 1, 1)
    real = torch.zeros(count, 1, 1, 1, dtype=torch.float64)
    half = torch.full((count, 1), 0.5, dtype=torch.float64)
    return Play(critic, real, fake, critic(real), critic(fake), lambda _: half)


def slopes(game: Game, penalty: Penalty, theta: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """Of the critic's loss by ψ, and of the generator's by θ; differentiable in both."""
    play = play_at(theta, psi)
    of_critic = penalty.applied(game.critic_loss(play.phi_real, play.phi_fake), penalty.terms(play))
    of_generator = game.generator_loss(play.phi_real, play.phi_fake)
    return (
        torch.autograd.grad(of_critic, psi, create_graph=True)[0],
        torch.autograd.grad(of_generator, theta, create_graph=True)[0],
    )


def trajectory(game: str, penalty: str, rate: float, steps: int, **settings: float) -> np.ndarray:
    """(θ, ψ) after every alternating step of gradient descent from (1, 1): first the critic's, then the generator's."""
    playing, kept = GAMES[game](), PENALTIES[penalty](**settings)
    theta, psi = 1.0, 1.0
    found = []
    for _ in range(steps):
        of_critic, _ = slopes(playing, kept, number(theta).requires_grad_(), number(psi).requires_grad_())
        critic = Line(number(psi - rate * of_critic.item()))
        kept.project_(critic)
        psi = critic.psi.item()
        _, of_generator = slopes(playing, kept, number(theta).requires_grad_(), number(psi).requires_grad_())
        theta -= rate * of_generator.item()
        found.append((theta, psi))
    return np.array(found)


def eigenvalues(game: str, penalty: str, **settings: float) -> np.ndarray:
    """Of the derivative of the gradient field −(∂ψ, ∂θ) at the equilibrium, θ = ψ = 0."""
    playing, kept = GAMES[game](), PENALTIES[penalty](**settings)
    at = (number(0.0).requires_grad_(), number(0.0).requires_grad_())
    of_psi, of_theta = slopes(playing, kept, *at)
    rows = [
        torch.autograd.grad(-slope, at[::-1], retain_graph=True, materialize_grads=True) for slope in (of_psi, of_theta)
    ]
    return np.linalg.eigvals(np.array([[float(entry) for entry in row] for row in rows]))


@pytest.mark.parametrize("game", ["minimax", "nonsaturating"])
@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_r1_has_the_eigenvalues_of_the_paper(game: str, weight: float) -> None:
    """−γ/2 ± √(γ²/4 − f'(0)²) with f'(0) = ½: all real parts are negative."""
    root = np.sqrt(complex(weight**2 / 4 - 1 / 4))
    found = eigenvalues(game, "r1", weight=weight)
    expected = np.array([-weight / 2 - root, -weight / 2 + root])
    np.testing.assert_allclose(np.sort_complex(found), np.sort_complex(expected), rtol=1e-12)
    assert (found.real < 0).all()


def test_without_a_penalty_eigenvalues_are_imaginary() -> None:
    np.testing.assert_allclose(np.sort_complex(eigenvalues("minimax", "none")), [-0.5j, 0.5j], atol=1e-15)


@pytest.mark.parametrize("game", ["minimax", "nonsaturating"])
def test_r1_converges(game: str) -> None:
    found = np.linalg.norm(trajectory(game, "r1", 0.2, 250, weight=1.0), axis=1)
    assert found[-1] < 1e-6


@pytest.mark.parametrize(
    ("game", "penalty", "settings"),
    [
        ("minimax", "none", {}),
        ("nonsaturating", "none", {}),
        ("wasserstein", "none", {}),
        ("wasserstein", "clip", {"limit": 1.0}),
        ("wasserstein", "gradient", {"weight": 0.1}),
    ],
    ids=str,
)
def test_others_circle(game: str, penalty: str, settings: dict[str, float]) -> None:
    """Long after the start they are still as far away, and have been on all sides."""
    late = trajectory(game, penalty, 0.2, 300, **settings)[150:]
    assert np.linalg.norm(late, axis=1).min() > 0.3
    assert late.min(axis=0).max() < 0 < late.max(axis=0).min()


def test_a_strong_gradient_penalty_stops_elsewhere() -> None:
    """Where it pulls |ψ| to 1 as hard as the game pulls ψ through 0: at θ = 2λ, ψ → 0."""
    found = trajectory("wasserstein", "gradient", 0.2, 200, weight=1.0)
    np.testing.assert_allclose(found[-1], [2, 0], atol=1e-6)


@pytest.mark.parametrize("theta", [-3.0, -0.2, 0.7])
def test_best_clipped_critic_finds_the_distance(theta: float) -> None:
    """Wasserstein's distance of δ_0 and δ_θ is |θ|: the critic with |ψ| ≤ 1 that steps lead to."""
    game, clip = GAMES["wasserstein"](), PENALTIES["clip"](limit=1.0)
    critic = Line(number(0.1))
    for _ in range(20):
        play = play_at(number(theta), critic.psi)
        loss = clip.applied(game.critic_loss(play.phi_real, play.phi_fake), clip.terms(play))
        with torch.no_grad():
            critic.psi -= torch.autograd.grad(loss, critic.psi)[0]
        clip.project_(critic)
    assert -game.critic_loss(critic(play.real), critic(play.fake)).item() == pytest.approx(abs(theta), rel=1e-12)


# MMD with a Gaussian kernel of width 1 of ψx is one with a kernel of width 1/ψ: the critic learns the bandwidth.
WIDTH_ONE = kernels.gaussian([1.0])
INVERSE_WIDTHS = np.geomspace(1e-3, 1e5, 65)


def discrepancies(theta: float, scaled: bool, weight: float = 10.0) -> np.ndarray:
    """MMD² of δ_0 and δ_θ for every bandwidth, divided by the critic's scale or not."""
    game, penalty = GAMES["mmd"](WIDTH_ONE), PENALTIES["scaled"](WIDTH_ONE, weight)
    found = []
    for psi in INVERSE_WIDTHS:
        play = play_at(number(theta), number(psi), count=2)
        loss = game.critic_loss(play.phi_real, play.phi_fake)
        found.append(-(penalty.applied(loss, penalty.terms(play)) if scaled else loss).item())
    return np.array(found)


def test_discrepancies_of_point_masses_in_closed_form() -> None:
    """MMD² = 2 (1 − exp(−ψ²θ²/2)), and the scale 1 + λ (1 + ψ²)."""
    mmd = 2 * -np.expm1(-(INVERSE_WIDTHS**2) * 0.3**2 / 2)
    np.testing.assert_allclose(discrepancies(0.3, scaled=False), mmd, rtol=1e-9, atol=1e-12)
    expected = mmd / (1 + 10 * (1 + INVERSE_WIDTHS**2))
    np.testing.assert_allclose(discrepancies(0.3, scaled=True), expected, rtol=1e-9, atol=1e-12)


def test_scaled_mmd_is_continuous_and_mmd_of_the_best_bandwidth_is_not() -> None:
    """As θ → 0 the largest MMD² over all bandwidths stays at 2, and is 0 at θ = 0 (Arbel et al. 2018)."""
    for theta in (1.0, 0.1, 0.01, 0.001):
        assert discrepancies(theta, scaled=False).max() == pytest.approx(2, rel=1e-6)
        assert discrepancies(theta, scaled=True).max() <= theta**2 / 10
    assert discrepancies(0.0, scaled=False).max() == 0


def test_against_the_best_bandwidth_only_scaled_mmd_has_a_gradient() -> None:
    """The generator's slope by θ, times θ, with the critic that maximises its own loss."""
    game = GAMES["mmd"](WIDTH_ONE)
    for theta in (1.0, 0.1):
        pulls = {}
        for scaled in (False, True):
            best = discrepancies(theta, scaled).argmax()
            at = number(theta).requires_grad_()
            play = play_at(at, number(INVERSE_WIDTHS[best]), count=2)
            pulls[scaled] = torch.autograd.grad(game.generator_loss(play.phi_real, play.phi_fake), at)[0].item() * theta
        assert abs(pulls[False]) < 1e-10
        assert pulls[True] > 0.5 * theta**2 * math.exp(-(theta**2))
