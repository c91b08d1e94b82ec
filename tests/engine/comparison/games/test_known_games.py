"""Known answers: best critics on a finite set of images, losses of PyTorch's own, and the Dirac-GAN's vector field."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from engine.comparison.games import GAMES, Game
from engine.comparison.games.adversarial import (
    hinge_critic,
    least_squares_critic,
    minimax_critic,
    minimax_generator,
    nonsaturating_generator,
    wasserstein_critic,
)
from engine.comparison.games.fisher import fisher_critic, fisher_distance, fisher_moment
from engine.comparison.games.mcgan import covariance_distance, mean_distance

# How many real and generated images there are of each of five kinds.
REAL = np.array([5, 3, 1, 1, 0])
FAKE = np.array([1, 1, 1, 2, 3])
P, Q = REAL / REAL.sum(), FAKE / FAKE.sum()


def shown(critic: Tensor) -> tuple[Tensor, Tensor]:
    """A critic of five outputs, shown all images: [10, 1] and [8, 1]."""
    kinds = torch.arange(5)
    return tuple(critic[kinds.repeat_interleave(torch.from_numpy(counts))][:, None] for counts in (REAL, FAKE))


def as_critic(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).requires_grad_()


def test_best_critic_of_minimax_has_2_log_2_minus_2_jensen_shannon() -> None:
    with np.errstate(divide="ignore"):
        logits = np.clip(np.log(P) - np.log(Q), -500, 500)
    critic = as_critic(logits)
    loss = minimax_critic(*shown(critic))
    assert loss.item() == pytest.approx(2 * math.log(2) - 2 * jensenshannon(P, Q) ** 2, rel=1e-12)
    assert torch.autograd.grad(loss, critic)[0].abs().max().item() < 1e-15


def test_equal_sets_have_2_log_2() -> None:
    zero = torch.zeros(4, 1, dtype=torch.float64)
    assert minimax_critic(zero, zero).item() == pytest.approx(2 * math.log(2), rel=1e-15)
    assert minimax_generator(zero).item() == pytest.approx(-math.log(2), rel=1e-15)
    assert nonsaturating_generator(zero).item() == pytest.approx(math.log(2), rel=1e-15)


def test_best_critic_of_least_squares_is_the_share_of_real_images() -> None:
    critic = as_critic(P / (P + Q))
    loss = least_squares_critic(*shown(critic))
    assert loss.item() == pytest.approx((P * Q / (P + Q)).sum() / 2, rel=1e-12)
    assert torch.autograd.grad(loss, critic)[0].abs().max().item() < 1e-15


def test_best_critic_of_hinge_has_2_minus_2_total_variation() -> None:
    loss = hinge_critic(*shown(as_critic(np.sign(P - Q))))
    variation = np.abs(P - Q).sum() / 2
    assert loss.item() == pytest.approx(2 - 2 * variation, rel=1e-12)
    random = np.random.default_rng(1)
    for _ in range(200):
        assert hinge_critic(*shown(as_critic(random.normal(scale=1.5, size=5)))).item() > loss.item()


def test_best_critic_of_wasserstein_has_the_distance() -> None:
    """On the line, the slopes of the best critic are the signs of the difference of distribution functions."""
    places = np.array([0.0, 0.7, 1.1, 2.5, 4.0])
    slopes = -np.sign(np.cumsum(P - Q))[:-1]
    critic = as_critic(np.concatenate([[0.0], np.cumsum(slopes * np.diff(places))]))
    loss = wasserstein_critic(*shown(critic))
    assert loss.item() == pytest.approx(-wasserstein_distance(places, places, P, Q), rel=1e-12)


def test_best_critic_of_fisher_has_the_chi_squared_distance() -> None:
    """Where its constraint holds the augmented terms vanish, and Λ = half the distance makes it a maximum."""
    mixture = (P + Q) / 2
    distance = math.sqrt(((P - Q) ** 2 / mixture).sum())
    critic = as_critic((P - Q) / mixture / distance)
    pair = shown(critic)
    assert fisher_moment(*pair).item() == pytest.approx(1, rel=1e-12)
    assert fisher_distance(*pair).item() == pytest.approx(distance, rel=1e-12)
    loss = fisher_critic(*pair, multiplier=distance / 2, rho=0.1)
    assert loss.item() == pytest.approx(-distance, rel=1e-12)
    assert torch.autograd.grad(loss, critic)[0].abs().max().item() < 1e-15
    random = np.random.default_rng(1)
    for _ in range(200):
        assert fisher_distance(*shown(as_critic(random.normal(size=5)))).item() < distance


def test_losses_are_pytorchs_binary_cross_entropies() -> None:
    random = torch.Generator().manual_seed(1)
    x, g = (5 * torch.randn(n, 1, generator=random, dtype=torch.float64) for n in (7, 5))
    one, zero = torch.ones_like, torch.zeros_like
    cross = binary_cross_entropy_with_logits
    torch.testing.assert_close(minimax_critic(x, g), cross(x, one(x)) + cross(g, zero(g)), rtol=1e-13, atol=0)
    torch.testing.assert_close(minimax_generator(g), -cross(g, zero(g)), rtol=1e-13, atol=0)
    torch.testing.assert_close(nonsaturating_generator(g), cross(g, one(g)), rtol=1e-13, atol=0)


# The Dirac-GAN (Mescheder et al. 2018): one real image at 0, one generated at θ, and the critic D(x) = ψx.


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def fisher_pull(theta: float, psi: float) -> float:
    """Minus the slope in ψ of ψθ − Λ(1 − Ω) + ρ/2 (1 − Ω)², Ω = ½ψ²θ², at Λ = 0.4 and ρ = 0.3."""
    omega = (psi * theta) ** 2 / 2
    return -theta - 0.4 * psi * theta**2 + 0.3 * (1 - omega) * psi * theta**2


# Game → what moves θ, and what moves ψ: minus the slopes of the generator's and the critic's losses.
FIELDS: dict[str, tuple[Callable[[float, float], float], Callable[[float, float], float]]] = {
    "minimax": (lambda t, p: p * sigmoid(p * t), lambda t, p: -t * sigmoid(p * t)),
    "nonsaturating": (lambda t, p: p * sigmoid(-p * t), lambda t, p: -t * sigmoid(p * t)),
    "boundary-seeking": (lambda t, p: -(p**2) * t, lambda t, p: -t * sigmoid(p * t)),
    "least-squares": (lambda t, p: p * (1 - p * t), lambda t, p: -p * t**2),
    "hinge": (lambda t, p: p, lambda t, p: -t if p * t > -1 else 0.0),
    "wasserstein": (lambda t, p: p, lambda t, p: -t),
    "fisher": (lambda t, p: p, fisher_pull),
    # With the norms' signs: the distance is |ψθ|, which the critic raises and the generator lowers.
    "mcgan-mean": (lambda t, p: -abs(p) * math.copysign(1, t), lambda t, p: abs(t) * math.copysign(1, p)),
    "mcgan-covariance": (lambda t, p: -2 * p**2 * t, lambda t, p: 2 * p * t**2),
}


def game_of(name: str) -> Game:
    settings = {"fisher": {"rho": 0.3}, "mcgan-covariance": {"components": 1}}.get(name, {})
    game = GAMES[name](**settings)
    if name == "fisher":
        game.multiplier.fill_(0.4)
    return game


def vector_field(game: Game, theta: Tensor, psi: Tensor, noise: float = 0.0) -> Tensor:
    """[2], differentiable: what moves θ and ψ. With noise, all images are moved by ± as much."""
    moves = torch.tensor([[noise], [-noise]], dtype=torch.float64)
    real, fake = psi * moves, psi * (theta + moves)
    (of_theta,) = torch.autograd.grad(game.generator_loss(real, fake), theta, create_graph=True)
    (of_psi,) = torch.autograd.grad(game.critic_loss(real, fake), psi, create_graph=True)
    return -torch.stack([of_theta, of_psi])


def consensus(game: Game, theta: Tensor, psi: Tensor, weight: float) -> Tensor:
    """v − γ ∇½‖v‖², the field that consensus optimization follows (Mescheder et al. 2017)."""
    field = vector_field(game, theta, psi)
    slopes = torch.autograd.grad(field.square().sum() / 2, (theta, psi), create_graph=True, materialize_grads=True)
    return field - weight * torch.stack(slopes)


def eigenvalues(field: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
    """Of a field's derivative at θ = ψ = 0, sorted."""
    at = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda both: field(both[0], both[1]), at)
    return np.sort_complex(np.linalg.eigvals(jacobian.numpy()))


def place(theta: float, psi: float) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in (theta, psi))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("theta", [-1.3, 0.4, 2.0])
@pytest.mark.parametrize("psi", [-0.9, 0.2, 1.5])
def test_vector_field_of_the_dirac_gan(name: str, theta: float, psi: float) -> None:
    found = vector_field(game_of(name), *place(theta, psi)).tolist()
    assert found == pytest.approx([one(theta, psi) for one in FIELDS[name]], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(
    ("name", "speed"), [("minimax", 0.5), ("nonsaturating", 0.5), ("wasserstein", 1), ("hinge", 1)]
)
def test_eigenvalues_at_the_equilibrium_are_imaginary(name: str, speed: float) -> None:
    """±i f'(0) (Mescheder, section 2): no step size makes gradient descent converge."""
    game = game_of(name)
    found = eigenvalues(lambda theta, psi: vector_field(game, theta, psi))
    np.testing.assert_allclose(found, [-1j * speed, 1j * speed], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["minimax", "nonsaturating"])
@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.0])
def test_instance_noise_converges(name: str, deviation: float) -> None:
    """f''(0)σ² ± √(f''(0)²σ⁴ − f'(0)²) with f'(0) = ½ and f''(0) = −¼: all real parts are negative."""
    game = game_of(name)
    found = eigenvalues(lambda theta, psi: vector_field(game, theta, psi, noise=deviation))
    root = np.sqrt(complex(deviation**4 / 16 - 1 / 4))
    expected = np.sort_complex([-(deviation**2) / 4 - root, -(deviation**2) / 4 + root])
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    if deviation >= 1:  # less noise asks for smaller steps
        assert math.hypot(*followed(lambda theta, psi: vector_field(game, theta, psi, noise=deviation))) < 1e-6


@pytest.mark.parametrize(
    ("name", "speed"), [("minimax", 0.5), ("nonsaturating", 0.5), ("wasserstein", 1.0), ("hinge", 1.0)]
)
def test_consensus_converges(name: str, speed: float) -> None:
    """−γs² ± is, with s the speed of the circle that the game alone follows."""
    game, weight = game_of(name), 0.7
    found = eigenvalues(lambda theta, psi: consensus(game, theta, psi, weight))
    expected = [complex(-weight * speed**2, -speed), complex(-weight * speed**2, speed)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert math.hypot(*followed(lambda theta, psi: consensus(game, theta, psi, weight))) < 1e-6


def followed(field: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """Where 300 simultaneous steps of 0.5 lead from (1, 1)."""
    at = [1.0, 1.0]
    for _ in range(300):
        moved = field(*place(*at)).tolist()
        at = [one + 0.5 * move for one, move in zip(at, moved, strict=True)]
    return at


@pytest.mark.parametrize("name", ["minimax", "wasserstein"])
def test_flow_circles_and_steps_spiral_outwards(name: str) -> None:
    """The field is at right angles to (θ, ψ); simultaneous steps of h lengthen it by √(1 + h²s²), s the speed."""
    game, theta, psi, length = game_of(name), 1.0, 1.0, math.sqrt(2)
    for _ in range(50):
        field = vector_field(game, *place(theta, psi)).tolist()
        assert theta * field[0] + psi * field[1] == pytest.approx(0, abs=1e-12)
        speed = 1.0 if name == "wasserstein" else sigmoid(theta * psi)
        theta, psi = theta + 0.1 * field[0], psi + 0.1 * field[1]
        length *= math.sqrt(1 + (0.1 * speed) ** 2)
        assert math.hypot(theta, psi) == pytest.approx(length, rel=1e-12)
    assert length > math.sqrt(2) * 1.01


@pytest.mark.parametrize("theta", [-3.0, -0.25, 0.5, 7.0])
def test_distances_of_two_point_masses(theta: float) -> None:
    """Wasserstein |θ| and its slope, Jensen-Shannon log 2, total variation 1: by the best critics of the games."""
    real = torch.zeros(3, 1, dtype=torch.float64)
    fake = torch.full((2, 1), theta, dtype=torch.float64, requires_grad=True)
    slope = -math.copysign(1, theta)
    found = -wasserstein_critic(slope * real, slope * fake)
    assert found.item() == abs(theta)
    assert torch.autograd.grad(found, fake)[0].sum().item() == math.copysign(1, theta)
    assert mean_distance(real, fake).item() == abs(theta)
    assert covariance_distance(real, fake, 1).item() == pytest.approx(theta**2)
    sure = torch.full((2, 1), 1e4, dtype=torch.float64)
    assert (math.log(2) - minimax_critic(sure, -sure) / 2).item() == math.log(2)
    assert (1 - hinge_critic(sure, -sure) / 2).item() == 1
