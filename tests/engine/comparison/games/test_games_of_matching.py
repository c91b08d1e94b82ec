"""McGAN's singular directions against NumPy's, and what the games of matching refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_games import outputs
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.comparison.games import GAMES, CovarianceMatching, FeatureMatching, MeanMatching
from engine.comparison.games.matching import labelled_critic, unlabelled_critic
from engine.comparison.games.mcgan import covariance_distance, mean_distance
from engine.support.errors import InputError


def by_svd(real: Tensor, fake: Tensor, components: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The distance and its gradients, of NumPy's singular vectors of the sums of outer products."""
    x, g = real.detach().numpy(), fake.detach().numpy()
    matrix = sum(np.outer(row, row) for row in x) / len(x) - sum(np.outer(row, row) for row in g) / len(g)
    left, values, right = np.linalg.svd(matrix)
    turn = left[:, :components] @ right[:components]
    symmetric = turn + turn.T
    of_real = np.stack([symmetric @ row / len(x) for row in x])
    of_fake = np.stack([-(symmetric @ row) / len(g) for row in g])
    return values[:components].sum(), of_real, of_fake


@pytest.mark.parametrize(
    ("n", "m", "size", "components"), [(1, 1, 1, 1), (7, 5, 4, 1), (7, 5, 4, 4), (2, 3, 6, 4), (40, 3, 17, 5)]
)
def test_covariance_game_is_the_svd(n: int, m: int, size: int, components: int) -> None:
    game, upstream = CovarianceMatching(components), torch.randn((), dtype=torch.float64)
    real, fake = outputs(n, size, 1).requires_grad_(), outputs(m, size, 2).requires_grad_()
    value, *gradients = by_svd(real, fake, components)
    for loss, sign in ((game.critic_loss, -1), (game.generator_loss, 1)):
        found = loss(real, fake)
        assert found.shape == ()
        torch.testing.assert_close(found.item(), sign * value, rtol=1e-10, atol=1e-12)
        expected = tuple(sign * upstream * torch.from_numpy(one) for one in gradients)
        torch.testing.assert_close(torch.autograd.grad(found, (real, fake), upstream), expected, rtol=1e-10, atol=1e-10)
    found = game.figures(real, fake, game.critic_loss(real, fake).detach())["distance"]
    torch.testing.assert_close(found.item(), value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("components", [1, 3, 4])
def test_second_derivatives_of_the_covariance_game(components: int) -> None:
    pair = outputs(5, 4, 1).requires_grad_(), outputs(3, 4, 2).requires_grad_()
    loss = CovarianceMatching(components).critic_loss
    assert torch.autograd.gradcheck(loss, pair)
    assert torch.autograd.gradgradcheck(loss, pair)


def test_equal_singular_values_divide_nothing() -> None:
    """Σ_x − Σ_G = diag(2, 2, −2, 0): any basis of the first two will do, and the fourth has no direction."""
    real = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0]], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([[0, 0, math.sqrt(2), 0]], dtype=torch.float64, requires_grad=True)
    for components in (3, 4):
        found = covariance_distance(real, fake, components)
        torch.testing.assert_close(found.item(), 6.0)
        gradients = torch.autograd.grad(found, (real, fake), create_graph=True)
        torch.testing.assert_close(gradients[0], real)  # 2/n · x
        torch.testing.assert_close(gradients[1], 2 * fake)
        second = torch.autograd.grad(sum(one.square().sum() for one in gradients), (real, fake))
        assert all(bool(one.isfinite().all()) for one in second)


def test_directions_in_which_nothing_varies_change_no_derivative() -> None:
    """Three images have at most three singular values; the six others of nine features are 0 but for rounding."""
    found = []
    for components in (3, 9):
        pair = outputs(2, 9, 1).requires_grad_(), outputs(1, 9, 2).requires_grad_()
        first = torch.autograd.grad(covariance_distance(*pair, components), pair, create_graph=True)
        upstream = [outputs(*one.shape, 3) for one in first]
        found.append((*first, *torch.autograd.grad(first, pair, upstream)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_eigenvalues_too_small_to_divide_by() -> None:
    """1/5e-311 is infinite in float64."""
    real = torch.tensor([[1.0, 0, 0], [0, 1e-155, 0]], dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(covariance_distance(real, torch.zeros_like(real), 3), real, create_graph=True)
    second = torch.autograd.grad(first, real, outputs(2, 3, 1))
    assert all(bool(one.isfinite().all()) for one in (*first, *second))


def test_equal_sets_have_distance_and_gradient_0() -> None:
    real = outputs(6, 5, 1).requires_grad_()
    fake = real.detach()
    for distance in (
        covariance_distance(real, fake, 3),
        *(mean_distance(real, fake, order) for order in (1, 2, math.inf)),
    ):
        assert distance.item() == 0
        assert not torch.autograd.grad(distance, real)[0].any()


def test_directions_of_the_primal_form_do_no_better() -> None:
    """tr Uᵀ(Σ_x − Σ_G)V of orthonormal U and V, and ⟨v, E φ(x) − E φ(G)⟩ of the dual norm's unit ball."""
    real, fake = outputs(9, 6, 1), outputs(8, 6, 2)
    matrix = real.T @ real / 9 - fake.T @ fake / 8
    best = covariance_distance(real, fake, 2).item()
    gap = real.mean(dim=0) - fake.mean(dim=0)
    random = torch.Generator().manual_seed(3)
    for _ in range(200):
        left, right = (torch.linalg.qr(torch.randn(6, 2, generator=random, dtype=torch.float64))[0] for _ in "UV")
        assert torch.trace(left.T @ matrix @ right).item() < best
        for order, dual in ((1, math.inf), (2, 2), (math.inf, 1)):
            v = torch.randn(6, generator=random, dtype=torch.float64)
            reached = (v @ gap / torch.linalg.vector_norm(v, ord=dual)).item()
            assert reached < mean_distance(real, fake, order).item()


def test_a_critic_that_is_not_finite_shows_in_the_loss() -> None:
    real, fake = outputs(4, 3, 1), outputs(4, 3, 2)
    for value in (math.nan, math.inf):
        real[1, 2] = value
        assert not math.isfinite(CovarianceMatching(2).critic_loss(real, fake).item())


@pytest.mark.parametrize("failures", [1, 2])
def test_eigenvectors_that_are_not_found(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK is asked twice; then the distance is NaN."""
    pair = outputs(9, 6, 1).requires_grad_(), outputs(8, 6, 2).requires_grad_()
    expected = covariance_distance(*pair, 2)
    of_images = torch.autograd.grad(expected, pair)
    found, left = torch.linalg.eigh, [None] * failures

    def eigh(matrix: Tensor) -> Any:
        if left:
            left.pop()
            raise torch.linalg.LinAlgError("no convergence")
        return found(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    distance = covariance_distance(*pair, 2)
    if failures == 2:
        assert math.isnan(distance.item())
        return
    torch.testing.assert_close(distance, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(distance, pair), of_images, rtol=1e-10, atol=1e-10)


def test_covariance_game_of_single_precision_under_autocast() -> None:
    real, fake = outputs(50, 8, 1).float().requires_grad_(), (outputs(50, 8, 2) + 100).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = CovarianceMatching(4).generator_loss(real, fake)
    assert found.dtype == torch.float32
    expected = covariance_distance(real.double(), fake.double(), 4)
    torch.testing.assert_close(found, expected.float())
    assert torch.autograd.grad(found, real)[0].dtype == torch.float32


def test_labels_against_cross_entropy_of_k_plus_1_classes() -> None:
    """PyTorch's cross entropy, with the class "generated" as a (k+1)-th logit of 0."""
    real, fake = outputs(7, 4, 1), outputs(5, 4, 2)
    labels = torch.tensor([0, 3, 1, 1, 2, 0, 3])

    def padded(logits: Tensor) -> Tensor:
        return torch.cat([logits, torch.zeros(len(logits), 1, dtype=logits.dtype)], dim=1)

    generated = cross_entropy(padded(fake), torch.full((5,), 4))
    # −log p(y) of k+1 classes = −log p(y | real) − log p(real): once for the labels, once for D.
    joint = labelled_critic(real, labels) + unlabelled_critic(real, fake)
    torch.testing.assert_close(joint, cross_entropy(padded(real), labels) + generated, rtol=1e-12, atol=0)


def test_no_labels_at_all_leave_the_half_without_labels() -> None:
    real = outputs(3, 4, 1).requires_grad_()
    found = labelled_critic(real, torch.full((3,), -1))
    assert found.item() == 0
    assert not torch.autograd.grad(found, real)[0].any()


def test_settings_that_are_refused() -> None:
    for make, message in (
        (lambda: MeanMatching(3), "order: must be 1, 2 or inf, got 3"),
        (lambda: CovarianceMatching(0), "components: must be at least 1, got 0"),
        (lambda: FeatureMatching(classes=0), "classes: must be at least 1, got 0"),
        (lambda: GAMES["began"](gamma=1.5), "gamma: must be positive and at most 1, got 1.5"),
        (lambda: GAMES["began"](rate=0), "rate: must be positive and finite, got 0"),
        (lambda: GAMES["fisher"](rho=math.nan), "rho: must be positive and finite, got nan"),
    ):
        with pytest.raises(InputError) as refusal:
            make()
        assert str(refusal.value) == message


def test_outputs_that_are_refused() -> None:
    two = torch.zeros(3, 2)
    with pytest.raises(InputError, match=r"^components: must be from 1 to the critic's 2 outputs, got 3$"):
        CovarianceMatching(3).critic_loss(two, two)
    game = FeatureMatching(classes=2)
    assert (game.outputs, game.reads_labels, FeatureMatching().reads_labels) == (2, True, False)
    with pytest.raises(InputError, match=r"^labels: the game of 2 classes needs the labels of real images$"):
        game.critic_loss(two, two)
    for labels in (torch.zeros(4, dtype=torch.int64), torch.zeros(3), torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(InputError, match=r"^labels: expected integers \[3\], got "):
            game.critic_loss(two, two, labels)
