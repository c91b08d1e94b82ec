"""The Sinkhorn divergence and the sliced Wasserstein distance against POT, closed forms and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import ot
import pytest
import torch
from oracle import relative_error
from test_distances_kernels import features
from torch import Tensor

from engine.comparison.distances import Sinkhorn, sinkhorn, sliced_wasserstein
from engine.comparison.distances.transport import directions
from engine.support.errors import InputError

EXACT = {"iterations": 100_000, "tolerance": 1e-12}


def plan_and_cost(x: Tensor, y: Tensor, epsilon: float) -> tuple[np.ndarray, float]:
    """POT's plan and value of min ⟨P, C⟩ + ε KL(P | 1/n ⊗ 1/m)."""
    cost = ot.dist(x.numpy(), y.numpy(), metric="sqeuclidean")
    a, b = np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y))
    plan = ot.bregman.sinkhorn_log(a, b, cost, epsilon, numItermax=10_000, stopThr=1e-12, warn=False)
    return plan, float((plan * cost).sum() + epsilon * (plan * np.log(plan * cost.size)).sum())


def of_pot(x: Tensor, y: Tensor, epsilon: float) -> tuple[float, Tensor, Tensor]:
    """S_ε and its gradients in x and y, Σ_j P_ij 2 (x_i − y_j) by the plans."""

    def pull(plan: np.ndarray, x: Tensor, y: Tensor) -> Tensor:
        weights = torch.from_numpy(plan)
        return 2 * (weights.sum(dim=1, keepdim=True) * x - weights @ y)

    (across, value), (of_x, value_x), (of_y, value_y) = (
        plan_and_cost(*pair, epsilon) for pair in ((x, y), (x, x), (y, y))
    )
    # OT_ε(x, x) has x on both sides, and its plan is symmetric: half of twice the pull of one side.
    gradients = pull(across, x, y) - pull(of_x, x, x), pull(across.T, y, x) - pull(of_y, y, y)
    return value - value_x / 2 - value_y / 2, *gradients


SIZES = [(2, 3, 1), (5, 4, 3), (7, 13, 5)]


@pytest.mark.parametrize("epsilon", [0.4, 2.0])
@pytest.mark.parametrize(("n", "m", "size"), SIZES)
def test_value_and_gradients_are_pots(n: int, m: int, size: int, epsilon: float) -> None:
    x, y = features(n, size, 1), features(m, size, 2)
    absolute = epsilon * float(torch.cdist(x, y).square().mean())
    value, *gradients = of_pot(x, y, absolute)
    x.requires_grad_(), y.requires_grad_()
    for found in (sinkhorn(x, y, epsilon, **EXACT), sinkhorn(x, y, absolute, relative=False, **EXACT)):
        assert found.shape == ()
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(value, rel=1e-8)
        for one, other in zip(torch.autograd.grad(3 * found, (x, y)), gradients, strict=True):
            torch.testing.assert_close(one, 3 * other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 1), (5, 7), (6, 6)])
def test_gradients_are_those_of_finite_differences(n: int, m: int) -> None:
    x, y = features(n, 3, 1).requires_grad_(), features(m, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: sinkhorn(x, y, 2.0, relative=False, **EXACT), (x, y))


def test_large_epsilon_is_the_distance_of_means_and_a_small_one_exact_transport() -> None:
    x, y = features(8, 3, 1), features(5, 3, 2)
    means = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    torch.testing.assert_close(sinkhorn(x, y, 1e6, **EXACT), means, rtol=1e-4, atol=0)
    exact = ot.emd2(np.full(8, 1 / 8), np.full(5, 1 / 5), ot.dist(x.numpy(), y.numpy()))
    assert sinkhorn(x, y, 1e-3, iterations=20_000, tolerance=1e-8).item() == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("tolerance", [None, 1e-10])
def test_iterations_are_no_more_than_asked_for(tolerance: float | None) -> None:
    """One iteration's value is the dual's at those potentials, so OT_ε itself is from below."""
    x, y = features(6, 3, 1), features(9, 3, 2)
    exact = sinkhorn(x, y, 0.05, **EXACT).item()
    errors = [abs(sinkhorn(x, y, 0.05, count, tolerance).item() - exact) for count in (1, 10, 100, 1000)]
    assert errors[0] > 10 * errors[2]
    assert errors[3] < 1e-6 * exact


def test_tolerance_bounds_the_error_of_the_marginals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loose one stops earlier, and never before the sums of the rows are right to it."""
    x, y = features(20, 4, 1), features(30, 4, 2)
    counts = {}
    from engine.comparison.distances import transport

    update = transport._update
    for tolerance in (1e-1, 1e-4, 1e-8):
        calls = []
        monkeypatch.setattr(transport, "_update", lambda cost, f, calls=calls: calls.append(1) or update(cost, f))
        cost = torch.cdist(x, y).square()
        f, g = transport._potentials(cost / cost.mean() / 0.05, 10_000, tolerance)
        plan = (f[:, None] + g - cost / cost.mean() / 0.05).exp() / cost.numel()
        assert float((plan.sum(dim=1) - 1 / 20).abs().sum()) < 1e-12  # f is the last that was updated
        assert float((plan.sum(dim=0) - 1 / 30).abs().sum()) < 2 * tolerance
        counts[tolerance] = len(calls)
    assert counts[1e-1] < counts[1e-4] < counts[1e-8]


@pytest.mark.parametrize("epsilon", [0.2, 1.0])
def test_equal_sets_are_no_distance_apart_and_have_no_gradient(epsilon: float) -> None:
    x = features(9, 4, 1)
    y = x[torch.randperm(9)]
    x.requires_grad_()
    found = sinkhorn(x, y, epsilon, **EXACT)
    assert found.item() == pytest.approx(0, abs=1e-10)
    assert float(torch.autograd.grad(found, x)[0].abs().max()) < 1e-8
    assert sinkhorn(torch.ones(4, 3), torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("distance", [sinkhorn, sliced_wasserstein])
def test_arithmetic_is_float32_at_least(distance: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    x, y = (features(12, 9, 1) + 5).to(dtype).requires_grad_(), (features(7, 9, 2) + 5).to(dtype)
    exact = x.detach().double().requires_grad_()
    expected = distance(exact, y.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distance(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    (gradient,), (wanted,) = torch.autograd.grad(found, x), torch.autograd.grad(expected, exact)
    assert gradient.dtype == dtype
    tolerance = max(1e-3, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_second_derivatives_of_sinkhorn_are_refused() -> None:
    x, y = features(4, 3, 1).requires_grad_(), features(5, 3, 2)
    (gradient,) = torch.autograd.grad(sinkhorn(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize(("n", "m", "size"), [(1, 1, 1), (1, 4, 3), (6, 6, 4), (5, 7, 3), (12, 8, 17)])
def test_sliced_is_pots(n: int, m: int, size: int) -> None:
    """POT's is the root of ours."""
    x, y = features(n, size, 1).requires_grad_(), features(m, size, 2).requires_grad_()
    found = sliced_wasserstein(x, y, projections=11, seed=3)
    expected = ot.sliced_wasserstein_distance(x, y, projections=directions(size, 11, seed=3)).square()
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, y)), torch.autograd.grad(expected, (x, y)), rtol=1e-8, atol=1e-12
    )


def test_sliced_of_one_feature_is_exact_transport() -> None:
    x, y = features(7, 1, 1), features(5, 1, 2)
    expected = ot.emd2_1d(x[:, 0].numpy(), y[:, 0].numpy(), metric="sqeuclidean")
    assert sliced_wasserstein(x, y, projections=1).item() == pytest.approx(expected, rel=1e-12)


def test_sliced_has_a_gradient_at_zero_and_where_values_are_equal() -> None:
    x = features(6, 4, 1).requires_grad_()
    found = sliced_wasserstein(x, x.detach().flip(0))
    assert found.item() == pytest.approx(0, abs=1e-14)
    assert float(torch.autograd.grad(found, x)[0].abs().max()) < 1e-12
    same = torch.zeros(4, 3, requires_grad=True)
    assert torch.autograd.grad(sliced_wasserstein(same, torch.ones(3, 3)), same)[0].isfinite().all()


def test_sliced_has_second_derivatives_also_after_a_call_in_inference_mode() -> None:
    x, y = features(6, 4, 1) + torch.rand(6, 4), features(5, 4, 2) + torch.rand(5, 4)  # no two values are equal
    with torch.inference_mode():
        sliced_wasserstein(x, y, 3)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sliced_wasserstein(x, y, 3), (x,))
    assert torch.autograd.gradgradcheck(lambda x: sliced_wasserstein(x, y, 3), (x,))


def test_features_that_are_not_finite_give_no_number() -> None:
    x, y = features(6, 4, 1), features(5, 4, 2)
    x[0, 0] = math.nan
    assert sinkhorn(x, y, iterations=20).isnan()
    assert sliced_wasserstein(x, y).isnan()


def test_directions_are_unit_vectors_of_the_seed() -> None:
    found = directions(5, 1000, seed=1)
    torch.testing.assert_close(found.norm(dim=0), torch.ones(1000).double())
    assert torch.equal(found, directions(5, 1000, seed=1))
    assert not torch.equal(found, directions(5, 1000, seed=2))
    torch.testing.assert_close(found @ found.T / 1000, torch.eye(5).double() / 5, rtol=0, atol=0.03)


X, Y = torch.rand(3, 4), torch.rand(2, 4)
BAD: list[tuple[Callable[[], object], str]] = [
    *((lambda value=value: sinkhorn(X, Y, epsilon=value), "epsilon") for value in (0.0, -1.0, math.nan, math.inf)),
    *((lambda value=value: sinkhorn(X, Y, tolerance=value), "tolerance") for value in (0.0, -1.0, math.nan)),
    (lambda: sinkhorn(X, Y, iterations=0), "iterations"),
    (lambda: sinkhorn(X[:0], Y), "x"),
    (lambda: sinkhorn(X, Y[:, :3]), "y"),
    (lambda: sliced_wasserstein(X, Y, projections=0), "projections"),
    (lambda: sliced_wasserstein(X[0], Y), "x"),
    (lambda: sliced_wasserstein(X, Y[:, :3]), "y"),
]


@pytest.mark.parametrize(("call", "argument"), BAD)
def test_bad_input_is_named(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert error.value.argument == argument


class TestBound:
    """`Sinkhorn` is `sinkhorn` with the real side's unit."""

    @pytest.mark.parametrize("epsilon", [0.05, 0.5])
    def test_is_the_function(self, epsilon):
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        y = torch.randn(9, 4, dtype=torch.float64) + 1
        unit = torch.cdist(y, y).square().mean()
        exact = {"iterations": 3000, "tolerance": 1e-12}
        expected = sinkhorn(x, y, float(epsilon * unit), relative=False, **exact)
        found = Sinkhorn(y, epsilon, **exact)(x)
        assert relative_error(found, expected) <= 1e-9
        (gradient,) = torch.autograd.grad(expected, x)
        assert relative_error(torch.autograd.grad(found, x)[0], gradient) <= 1e-9

    @pytest.mark.parametrize("argument", ["epsilon", "iterations", "tolerance"])
    def test_not_positive(self, argument):
        with pytest.raises(InputError) as error:
            Sinkhorn(torch.randn(3, 2), **{argument: 0})
        assert error.value.argument == argument
