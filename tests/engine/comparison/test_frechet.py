"""The Fréchet distance against SciPy's matrix root, POT, closed forms and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import ot
import pytest
import torch
from scipy.linalg import sqrtm
from test_distances_kernels import features
from torch import Tensor

from engine.comparison.distances import Frechet, frechet, frechet_of_moments
from engine.support.errors import InputError


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(dim=0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def of_scipy(mean: Tensor, covariance: Tensor, real_mean: Tensor, real_covariance: Tensor) -> float:
    """As FID's first code has it, by the root of the two covariances' product, which isn't symmetric."""
    root = sqrtm((covariance @ real_covariance).detach().numpy())
    rest = (mean - real_mean).square().sum() + covariance.trace() + real_covariance.trace()
    return rest.item() - 2 * float(np.trace(root).real)


def of_pot(mean: Tensor, covariance: Tensor, real_mean: Tensor, real_covariance: Tensor) -> Tensor:
    """POT's Bures-Wasserstein distance, squared; differentiable where no eigenvalue is 0 or double."""
    root: Tensor = ot.gaussian.bures_wasserstein_distance(mean, real_mean, covariance, real_covariance)
    return root.square().reshape(())


REGULAR = [(5, 4, 1), (7, 11, 3), (31, 17, 13)]  # more images than features on both sides


@pytest.mark.parametrize(("n", "m", "size"), REGULAR)
def test_value_and_gradients_are_pots(n: int, m: int, size: int) -> None:
    x, y = features(n, size, 1).requires_grad_(), features(m, size, 2).requires_grad_()
    found, expected = frechet(x, y), of_pot(*moments(x), *moments(y))
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(of_scipy(*moments(x), *moments(y)), rel=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(3 * found, (x, y)), torch.autograd.grad(3 * expected, (x, y)), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize(("n", "m", "size"), [(2, 2, 1), (3, 5, 7), (5, 3, 7), (4, 9, 6), (6, 4, 5), (2, 2, 9)])
def test_gradients_of_singular_covariances_are_those_of_finite_differences(n: int, m: int, size: int) -> None:
    x, y = features(n, size, 1).requires_grad_(), features(m, size, 2).requires_grad_()
    assert torch.autograd.gradcheck(frechet, (x, y), atol=1e-6, rtol=1e-6)
    for bound in (Frechet.of(y), Frechet(*moments(y.detach()))):
        assert torch.autograd.gradcheck(bound, (x,), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("n", "m", "size"), [*REGULAR, (3, 5, 7), (5, 3, 7), (9, 40, 30), (40, 9, 30)])
def test_bound_is_the_same_whatever_it_was_made_of(n: int, m: int, size: int) -> None:
    x, y = features(n, size, 1).requires_grad_(), features(m, size, 2)
    expected = frechet(x, y)
    (gradient,) = torch.autograd.grad(expected, x, retain_graph=True)
    for bound in (Frechet.of(y), Frechet(*moments(y)), lambda x: frechet_of_moments(*moments(x), *moments(y))):
        found = bound(x)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        # Of moments, eigenvalues are known to eps of the largest, and so their roots to √eps.
        tolerance = 1e-8 if isinstance(bound, Frechet) else 1e-6
        torch.testing.assert_close(torch.autograd.grad(found, x)[0], gradient, rtol=tolerance, atol=tolerance)


def test_covariance_is_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = features(23, 5, 1) + 100, features(9, 5, 2)
    expected = of_scipy(*moments(x), *moments(y))
    monkeypatch.setattr("engine.comparison.distances.gaussians._BLOCK", 4)
    assert float(Frechet.of(y)(x)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_moments_and_their_gradients_are_pots(size: int) -> None:
    mean, covariance = (tensor.requires_grad_() for tensor in moments(features(3 * size + 2, size, 1)))
    real = moments(features(4 * size + 2, size, 2))
    expected = of_pot(mean, covariance, *real)
    wanted = torch.autograd.grad(expected, (mean, covariance))
    for found in (frechet_of_moments(mean, covariance, *real), Frechet(*real).of_moments(mean, covariance)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        of_mean, of_covariance = torch.autograd.grad(found, (mean, covariance))
        torch.testing.assert_close(of_mean, wanted[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(of_covariance, (wanted[1] + wanted[1].T) / 2, rtol=1e-8, atol=1e-9)


def test_running_moments_pass_the_gradient_to_the_newest_minibatch() -> None:
    """Σ̂ = β S + (1−β) E xxᵀ − μ̂μ̂ᵀ, as a moving average has it; the oracle is POT's, through the same moments."""
    x = features(6, 4, 1).requires_grad_()
    past = features(30, 4, 3)
    mean = 0.9 * past.mean(dim=0) + 0.1 * x.mean(dim=0)
    covariance = 0.9 * past.T @ past / 30 + 0.1 * x.T @ x / 6 - torch.outer(mean, mean)
    real = moments(features(25, 4, 2))
    found, expected = Frechet(*real).of_moments(mean, covariance), of_pot(mean, covariance, *real)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, retain_graph=True), torch.autograd.grad(expected, x), rtol=1e-8, atol=1e-10
    )


def test_one_feature_in_closed_form() -> None:
    """(μ − μ')² + (σ − σ')²."""
    x, y = features(7, 1, 1), features(9, 1, 2)
    expected = (x.mean() - y.mean()).square() + (x.std() - y.std()).square()
    for found in (frechet(x, y), Frechet.of(y)(x), frechet_of_moments(*moments(x), *moments(y))):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_covariances_with_common_eigenvectors_in_closed_form() -> None:
    """Σ (√λ − √λ')², eigenvalues that are equal or 0 among them; gradient 1 − √(λ'/λ) in λ."""
    of_x, of_y = torch.tensor([4.0, 4.0, 0.0, 1.0, 0.0]).double(), torch.tensor([9.0, 9.0, 9.0, 0.0, 0.0]).double()
    turn = torch.linalg.qr(features(5, 5, 1))[0]
    covariance = (turn * of_x @ turn.T).requires_grad_()
    found = frechet_of_moments(torch.zeros(5), covariance, torch.ones(5), turn * of_y @ turn.T)
    assert found.item() == pytest.approx(5 + 1 + 1 + 9 + 1, rel=1e-6)
    (gradient,) = torch.autograd.grad(found, covariance)
    # A variance of 0 where the real one is 9: the gradient there is −∞, and the subgradient without it is taken.
    expected = 1 - torch.tensor([1.5, 1.5, 0.0, 0.0, 0.0]).double()
    torch.testing.assert_close(turn.T @ gradient @ turn, torch.diag(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n", "size"), [(9, 4), (5, 12)], ids=["regular", "singular"])
def test_equal_sets_are_no_distance_apart_and_have_no_gradient(n: int, size: int) -> None:
    x = features(n, size, 1).requires_grad_()
    real = x.detach()
    for found in (frechet(x, real), Frechet.of(real)(x), Frechet(*moments(real))(x), frechet(x, real.flip(0))):
        assert found.item() == pytest.approx(0, abs=1e-8)
        assert float(torch.autograd.grad(found, x)[0].abs().max()) < 1e-6
    covariance = moments(real)[1].requires_grad_()
    found = Frechet(*moments(real)).of_moments(real.mean(dim=0), covariance)
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(found, covariance)[0].isfinite().all()


def test_features_that_do_not_vary_have_a_finite_gradient() -> None:
    """Then only the means differ, and the other side's variance is all left."""
    point, cloud = torch.ones(5, 3, dtype=torch.float64), features(8, 3, 2)
    expected = float((1 - cloud.mean(dim=0)).square().sum() + cloud.var(dim=0).sum())
    for x, y in ((point, cloud), (cloud, point), (point, point + 1)):
        x = x.clone().requires_grad_()
        for found in (frechet(x, y), Frechet.of(y)(x), frechet_of_moments(*moments(x), *moments(y))):
            assert found.item() == pytest.approx(3 if y is not cloud and x[0, 0] == 1 else expected, rel=1e-9)
            assert torch.autograd.grad(found, x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arithmetic_is_float64_whatever_the_dtype(dtype: torch.dtype) -> None:
    x, y = (features(6, 9, 1) + 50).to(dtype).requires_grad_(), (features(7, 9, 2) + 50).to(dtype)
    exact = x.detach().double().requires_grad_()
    expected = frechet(exact, y.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found in (frechet(x, y), Frechet.of(y)(x)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
            (gradient,) = torch.autograd.grad(found, x)
            assert gradient.dtype == dtype
            wanted = torch.autograd.grad(expected, exact, retain_graph=True)[0]
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)


def test_second_derivatives_are_refused() -> None:
    x, y = features(4, 3, 1).requires_grad_(), features(5, 3, 2)
    (gradient,) = torch.autograd.grad(frechet(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(gradient.sum(), x)


def test_features_that_are_not_finite_give_no_number_and_no_error() -> None:
    x, y = features(4, 3, 1), features(5, 3, 2)
    x[1, 1] = math.nan
    for found in (frechet(x, y), Frechet.of(y)(x), frechet_of_moments(*moments(x), *moments(y))):
        assert found.isnan()


GOOD = (torch.zeros(3), torch.eye(3))
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: frechet(torch.rand(1, 3), torch.rand(2, 3)), "x"),
    (lambda: frechet(torch.rand(2, 3), torch.rand(1, 3)), "y"),
    (lambda: frechet(torch.rand(2, 3), torch.rand(2, 4)), "y"),
    (lambda: Frechet.of(torch.rand(1, 3)), "y"),
    (lambda: Frechet(*GOOD)(torch.rand(1, 3)), "x"),
    (lambda: Frechet(*GOOD)(torch.rand(5, 4)), "x"),
    (lambda: Frechet(torch.zeros(3, 1), torch.eye(3)), "mean"),
    (lambda: Frechet(torch.zeros(0), torch.eye(0)), "mean"),
    (lambda: Frechet(torch.zeros(3), torch.eye(4)), "covariance"),
    (lambda: Frechet(torch.zeros(3), torch.eye(3, dtype=torch.int64)), "covariance"),
    (lambda: Frechet(torch.zeros(3), -torch.eye(3)), "covariance"),
    (lambda: Frechet(torch.zeros(3), torch.eye(3).tril() + torch.ones(3, 3).tril()), "covariance"),
    (lambda: Frechet(torch.zeros(3), torch.eye(3) * math.inf), "covariance"),
    (lambda: Frechet(*GOOD).of_moments(torch.zeros(2), torch.eye(2)), "mean"),
    (lambda: Frechet(*GOOD).of_moments(torch.zeros(3), torch.eye(2)), "covariance"),
    (lambda: frechet_of_moments(*GOOD, torch.zeros(3), torch.eye(2)), "real_covariance"),
    (lambda: frechet_of_moments(torch.zeros(2), torch.eye(2), *GOOD), "mean"),
]


@pytest.mark.parametrize(("call", "argument"), BAD)
def test_bad_input_is_named(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert error.value.argument == argument
