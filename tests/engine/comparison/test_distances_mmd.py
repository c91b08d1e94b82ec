"""MMD² against the double loop over pairs in float64, closed forms, and itself in blocks."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from helpers.kernel_pairs import PAIRS, looped
from scipy import stats
from sklearn.metrics.pairwise import pairwise_kernels
from test_distances_kernels import NAMES, features, with_duplicates
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.comparison.distances import MMD, energy_distance, kernels, mmd
from engine.comparison.distances import mean_embedding as module
from engine.support.errors import InputError

BIAS = pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])


def oracle(name: str, x: Tensor, y: Tensor, unbiased: bool) -> Tensor:
    """MMD² as one writes it, a pair at a time."""
    pair = PAIRS[name][1]

    def within(z: Tensor) -> Tensor:
        keep = ~torch.eye(len(z), dtype=torch.bool) if unbiased else torch.ones(len(z), len(z), dtype=torch.bool)
        return looped(pair, z, z)[keep].mean()

    return within(x) + within(y) - 2 * looped(pair, x, y).mean()


SIZES = [(2, 2, 1), (2, 7, 3), (7, 5, 6), (13, 11, 17)]


@BIAS
@pytest.mark.parametrize(("n", "m", "size"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_are_the_oracles(name: str, n: int, m: int, size: int, unbiased: bool) -> None:
    x, y = features(n, size, 1).requires_grad_(), features(m, size, 2).requires_grad_()
    found, expected = mmd(x, y, PAIRS[name][0], unbiased), oracle(name, x, y, unbiased)
    assert found.shape == ()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, y)), torch.autograd.grad(expected, (x, y)), rtol=1e-10, atol=1e-11
    )


@BIAS
@pytest.mark.parametrize("name", NAMES)
def test_duplicates_change_no_digit(name: str, unbiased: bool) -> None:
    x, y = with_duplicates()
    x.requires_grad_()
    for found in (mmd(x, y, PAIRS[name][0], unbiased), MMD(y, PAIRS[name][0], unbiased, block=2)(x)):
        expected = oracle(name, x, y, unbiased)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(found, x), torch.autograd.grad(expected, x), rtol=1e-10, atol=1e-11
        )


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_those_of_finite_differences(name: str) -> None:
    """A gradient penalty needs them, in blocks as well."""
    kernel = PAIRS[name][0]
    x, y = (torch.randn(rows, 4, dtype=torch.float64, requires_grad=True) for rows in (3, 5))  # no two rows are equal
    assert torch.autograd.gradcheck(lambda x, y: mmd(x, y, kernel, True), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: mmd(x, y, kernel, True), (x, y))
    assert torch.autograd.gradcheck(MMD(y, kernel, block=2), (x,))
    assert torch.autograd.gradgradcheck(MMD(y, kernel, block=2), (x,))


@BIAS
@pytest.mark.parametrize("block", [1, 4, 10, 11, 12, None])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_change_nothing(name: str, block: int | None, unbiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CONSTANT_BLOCK", 4)
    kernel = PAIRS[name][0]
    x, y = features(6, 9, 1).requires_grad_(), features(11, 9, 2)
    bound = MMD(y, kernel, unbiased, block)
    found, expected = bound(x), mmd(x, y, kernel, unbiased)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(3 * found, x), torch.autograd.grad(3 * expected, x), rtol=1e-10, atol=1e-13
    )
    with torch.no_grad():
        torch.testing.assert_close(bound(x), expected.detach(), rtol=1e-12, atol=1e-13)


@BIAS
def test_constant_is_a_float64_mean_whatever_the_dtype(unbiased: bool) -> None:
    y = features(23, 7, 3).float()
    matrix = pairwise_kernels(y.double().numpy(), metric="polynomial", degree=3, gamma=1 / 7, coef0=1)
    expected = matrix[~np.eye(23, dtype=bool)].mean() if unbiased else matrix.mean()
    found = MMD(y, kernels.polynomial(3), unbiased).constant
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-13)


class LargestResult(TorchDispatchMode):
    """The most elements that an operation's result with memory of its own has; a view of y costs nothing."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = function(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, found.numel())
        return found


class Saved:
    """What a graph keeps for backward, for as long as it keeps it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def test_memory_is_that_of_one_block() -> None:
    """Neither forward nor backward makes a matrix for all of y, and one block's matrices are freed before the next."""
    n, m, size, block = 8, 5000, 32, 50
    bound = MMD(features(m, size, 1).float(), kernels.gaussian(), block=block)
    x = features(n, size, 2).float().requires_grad_()
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    most = 0

    def keep(tensor: Tensor) -> Saved:
        nonlocal most
        saved = Saved(tensor)
        alive.add(saved)
        most = max(most, sum(one.tensor.numel() for one in alive))
        return saved

    with LargestResult() as seen:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
            loss = bound(x)
        loss.backward()
    assert x.grad is not None
    assert seen.elements == n * block
    assert block * size < most < n * m / 4


@pytest.mark.parametrize("name", NAMES)
def test_a_call_makes_nothing_of_the_size_of_y(name: str) -> None:
    """What depends on y alone is computed once: y about its mean, for one."""
    n, m, size = 8, 500, 64
    bound = MMD(features(m, size, 1).float(), PAIRS[name][0])
    x = features(n, size, 2).float().requires_grad_()
    with LargestResult() as seen:
        bound(x).backward()
    assert n * m <= seen.elements < m * size


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_two_sides_may_differ_in_dtype_and_lie_far_from_the_origin(
    name: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, y = features(6, 9, 1).float() + 10, features(11, 9, 2).float() + 10
    found = MMD(y.to(dtypes[1]), PAIRS[name][0], block=4)(x.to(dtypes[0]))
    expected = oracle(name, x.double(), y.double(), False)
    scale = float(MMD(y.double(), PAIRS[name][0]).constant.abs())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize(("n", "m"), [(2, 3), (9, 4)])
def test_linear_kernel_is_the_distance_of_means(n: int, m: int) -> None:
    x, y = features(n, 6, 1), features(m, 6, 2)
    expected = (x.mean(0) - y.mean(0)).square().sum()
    torch.testing.assert_close(mmd(x, y, kernels.linear()), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("n", "m"), [(2, 3), (50, 31)])
def test_energy_kernel_is_scipys_energy_distance(n: int, m: int) -> None:
    """SciPy's is the root of it: D² = 2 E|x−y| − E|x−x'| − E|y−y'| (Székely & Rizzo 2013)."""
    x, y = features(n, 1, 1), features(m, 1, 2)
    expected = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert float(mmd(x, y, kernels.energy())) == pytest.approx(expected, rel=1e-10)
    assert float(energy_distance(x, y)) == pytest.approx(expected, rel=1e-10)


@BIAS
def test_energy_distance_is_the_loops(unbiased: bool) -> None:
    x, y = features(5, 4, 1).requires_grad_(), features(7, 4, 2)
    found, expected = energy_distance(x, y, unbiased), oracle("energy", x, y, unbiased)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_set_is_no_distance_from_itself(name: str) -> None:
    x = features(9, 5, 1)
    kernel = PAIRS[name][0]
    assert float(mmd(x, x, kernel)) == pytest.approx(0, abs=1e-13)
    assert float(mmd(x, x[torch.randperm(9)], kernel)) == pytest.approx(0, abs=1e-12)
    assert float(MMD(x, kernel, block=2)(x)) == pytest.approx(0, abs=1e-12)


def test_gaussian_mmd_of_two_points_in_closed_form() -> None:
    """x twice at 0, y twice at d: MMD² = 2 − 2 exp(−d²/(2σ²)), biased or not."""
    x, y = torch.zeros(2, 1, dtype=torch.float64), torch.full((2, 1), 1.5, dtype=torch.float64)
    expected = 2 - 2 * np.exp(-(1.5**2) / (2 * 0.8**2))
    for unbiased in (False, True):
        assert float(mmd(x, y, kernels.gaussian(bandwidths=[0.8]), unbiased)) == pytest.approx(expected, rel=1e-14)


def test_unbiased_estimate_is_zero_on_average() -> None:
    """Two sets of one law: the mean of 400 unbiased estimates is within four standard errors of 0, the biased isn't."""
    random = torch.Generator().manual_seed(0)
    kernel = kernels.rational_quadratic()
    draws = [torch.randn(2, 12, 3, generator=random, dtype=torch.float64) for _ in range(400)]
    for unbiased in (True, False):
        values = np.array([float(mmd(x, y, kernel, unbiased)) for x, y in draws])
        assert (abs(values.mean()) < 4 * values.std() / 20) == unbiased


@BIAS
@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_good_as_its_products(name: str, unbiased: bool) -> None:
    x, y = features(40, 96, 1).requires_grad_(), features(60, 96, 2)
    low = x.detach().float().requires_grad_()
    found = mmd(low, y, PAIRS[name][0], unbiased)
    expected = mmd(x, y, PAIRS[name][0], unbiased)
    assert found.dtype == torch.float32
    scale = float(PAIRS[name][0](x.detach(), y).abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * scale)
    (gradient,), (exact,) = torch.autograd.grad(found, low), torch.autograd.grad(expected, x)
    assert float((gradient - exact).norm() / exact.norm()) < 1e-4


def test_half_precision_is_widened() -> None:
    x, y = features(20, 8, 1).bfloat16().requires_grad_(), features(30, 8, 2).bfloat16()
    found = mmd(x, y, kernels.gaussian())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), mmd(x.double(), y.double(), kernels.gaussian()), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(MMD(y, kernels.gaussian(), block=7)(x), x)
    assert gradient.dtype == torch.bfloat16
    assert gradient.float().abs().max() > 0


@pytest.mark.parametrize("argument", ["x", "y"])
def test_too_few_rows_are_refused(argument: str) -> None:
    sets = {"x": torch.rand(4, 3), "y": torch.rand(5, 3)}
    for rows, unbiased in ((1, True), (0, False), (0, True)):
        wrong = {**sets, argument: torch.rand(rows, 3)}
        with pytest.raises(InputError) as error:
            mmd(**wrong, kernel=kernels.linear(), unbiased=unbiased)
        assert error.value.argument == argument
        with pytest.raises(InputError) as error:
            MMD(wrong["y"], kernels.linear(), unbiased)(wrong["x"])
        assert error.value.argument == argument
    assert mmd(torch.rand(1, 3), torch.rand(1, 3), kernels.linear()).shape == ()


def test_other_mistakes_are_refused() -> None:
    with pytest.raises(InputError) as error:
        mmd(torch.rand(4, 3), torch.rand(4, 2), kernels.linear())
    assert error.value.argument == "y"
    with pytest.raises(InputError) as error:
        MMD(torch.rand(4, 3), kernels.linear())(torch.rand(4, 2))
    assert error.value.argument == "x"
    with pytest.raises(InputError) as error:
        MMD(torch.rand(4, 3), kernels.linear(), block=0)
    assert error.value.argument == "block"
