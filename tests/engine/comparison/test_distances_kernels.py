"""The kernels against scikit-learn, SciPy, a double loop over pairs, and finite differences."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.kernel_pairs import PAIRS, looped
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import euclidean_distances, pairwise_kernels
from torch import Tensor

from engine.comparison.distances import kernels
from engine.comparison.distances.kernels import KERNELS, Kernel, median_distance, squared_distances
from engine.support.errors import InputError

NAMES = list(PAIRS)


def features(count: int, size: int, seed: int, offset: float = 0.0) -> Tensor:
    """[count, size] of a ReLU network's kind, far from the origin if asked."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=random, dtype=torch.float64).relu() + offset


def with_duplicates(n: int = 7, m: int = 5, size: int = 6, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features of which some rows are equal, within a set and between the two."""
    x, y = features(n, size, 1, offset), features(m, size, 2, offset)
    x[3] = x[1]
    y[0] = x[1]
    y[4] = y[2]
    return x, y


def test_every_name_has_a_factory_that_needs_no_argument() -> None:
    assert set(KERNELS) == set(NAMES)
    x, y = features(4, 3, 0), features(5, 3, 1)
    for factory in KERNELS.values():
        assert factory()(x, y).shape == (4, 5)


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["centred", "far"])
@pytest.mark.parametrize("same", [False, True], ids=["two sets", "x is y"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_a_double_loop(name: str, same: bool, offset: float) -> None:
    kernel, pair = PAIRS[name]
    x, y = (tensor.requires_grad_() for tensor in with_duplicates(offset=offset))
    y = x if same else y
    found, expected = kernel(x, y), looped(pair, x, y)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    scale = float(expected.detach().abs().max())  # of polynomials far from the origin
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * max(1.0, scale))
    for one, other in zip(
        torch.autograd.grad((found * upstream).sum(), [x] if same else [x, y]),
        torch.autograd.grad((expected * upstream).sum(), [x] if same else [x, y]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    kernel = PAIRS[name][0]
    x, y = features(3, 4, 1).requires_grad_(), features(2, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(kernel, (x, y))
    assert torch.autograd.gradgradcheck(kernel, (x, y))
    if name != "energy":  # which has a corner at 0
        assert torch.autograd.gradgradcheck(lambda x: kernel(x, x), (x,))
        x, y = (tensor.requires_grad_() for tensor in with_duplicates(4, 5, 2))
        assert torch.autograd.gradcheck(kernel, (x, y))
        assert torch.autograd.gradgradcheck(kernel, (x, y))


@pytest.mark.parametrize(("n", "m", "size"), [(1, 1, 1), (2, 13, 3), (31, 7, 257)])
def test_kernels_are_scikit_learns(n: int, m: int, size: int) -> None:
    x, y = features(n, size, 3), features(m, size, 4)
    squares = euclidean_distances(x, y, squared=True)
    expected = {
        "gaussian": sum(pairwise_kernels(x, y, metric="rbf", gamma=1 / (2 * s**2)) for s in (0.7, 2.0)),
        "rational-quadratic": sum((1 + squares / (2 * a)) ** -a for a in (0.2, 0.5, 1.0, 2.0, 5.0)),
        "rational-quadratic-linear": pairwise_kernels(x, y, metric="linear")
        + sum((1 + squares / (2 * a)) ** -a for a in (0.5, 2.0)),
        "imq": sum(c / (c + squares) for c in (0.3, 4)),
        "polynomial": pairwise_kernels(x, y, metric="polynomial", degree=3, gamma=1 / size, coef0=1),
        "linear": pairwise_kernels(x, y, metric="linear"),
        "energy": -euclidean_distances(x, y),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(PAIRS[name][0](x, y), values, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_no_derivative_is_infinite_where_points_meet(name: str) -> None:
    x = features(3, 4, 1)
    x[2] = x[0]
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(PAIRS[name][0](x, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert gradient.isfinite().all()
    assert second.isfinite().all()


def test_energy_has_no_gradient_between_duplicates() -> None:
    x = (features(6, 400, 1) * 1e3)[[0, 1, 2, 3, 4, 5, 0, 3]].requires_grad_()
    y = x.detach()[[0, 3, 6]].clone()
    for dtype in (torch.float32, torch.float64):
        found = kernels.energy()(x.to(dtype), y.to(dtype))
        equal = torch.zeros(8, 3, dtype=torch.bool)
        equal[[0, 6, 0, 6], [0, 0, 2, 2]] = equal[[3, 7], [1, 1]] = True
        assert torch.equal(found == 0, equal)
        (gradient,) = torch.autograd.grad(found[equal].sum(), x)
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("size", [1, 16, 333, 3584])
def test_error_of_squared_distances_is_what_the_docstring_says(size: int) -> None:
    x = features(40, size, 5)
    y = torch.cat([x[:9], x[:9] + 1e-4, features(20, size, 6)])
    exact = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    shift = torch.cat([x, y]).mean(0)
    norms = (x - shift).square().sum(1)[:, None] + (y - shift).square().sum(1)
    found = squared_distances(x.float(), y.float()).double()
    bound = (8 + math.sqrt(size)) * torch.finfo(torch.float32).eps * norms
    assert (found >= 0).all()
    assert ((found - exact).abs() <= bound).all()


def test_a_shift_of_both_sets_costs_few_digits() -> None:
    """Features far from the origin: ‖x‖² + ‖y‖² − 2x·y in float32 alone would be wrong in the first digit."""
    x, y = features(20, 64, 7), features(30, 64, 8)
    found = squared_distances((x + 1000).float(), (y + 1000).float())
    torch.testing.assert_close(found.double(), squared_distances(x, y), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_result_has_the_dtype_of_x(name: str, dtype: torch.dtype) -> None:
    x, y = features(5, 8, 1).to(dtype), features(4, 8, 2)
    found = PAIRS[name][0](x, y)
    assert found.dtype == dtype
    expected = PAIRS[name][0](x.double(), y)
    torch.testing.assert_close(found.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    x, y = features(5, 8, 1).float(), features(4, 8, 2).float()
    expected = PAIRS[name][0](x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(PAIRS[name][0](x, y), expected)


def test_layout_changes_nothing() -> None:
    x, y = features(9, 14, 1), features(5, 14, 2)
    for kernel, _ in PAIRS.values():
        torch.testing.assert_close(kernel(x[::2, ::2], y[:, 1::2]), kernel(x[::2, ::2].clone(), y[:, 1::2].clone()))


def test_kernels_tell_their_settings() -> None:
    assert repr(kernels.gaussian(bandwidths=[1, 2.5])) == "Gaussian(bandwidths=(1.0, 2.5))"
    assert repr(kernels.polynomial(2)) == "Polynomial(degree=2)"
    assert kernels.imq((1, 2)) == kernels.imq([1.0, 2.0])


@pytest.mark.parametrize("value", [(), (0.0,), (1.0, -2.0), (math.nan,), (math.inf,), ("wide",), 3.0, None])
@pytest.mark.parametrize(
    ("factory", "argument"),
    [
        (kernels.gaussian, "bandwidths"),
        (kernels.rational_quadratic, "alphas"),
        (kernels.rational_quadratic_linear, "alphas"),
        (kernels.imq, "scales"),
    ],
    ids=["gaussian", "rational-quadratic", "rational-quadratic-linear", "imq"],
)
def test_bad_widths_are_refused(factory: Callable[..., Kernel], argument: str, value: object) -> None:
    with pytest.raises(InputError) as error:
        factory(**{argument: value})
    assert error.value.argument == argument


@pytest.mark.parametrize("degree", [0, -1, 2.5, True, "3"])
def test_bad_degree_is_refused(degree: object) -> None:
    with pytest.raises(InputError) as error:
        kernels.polynomial(degree=degree)  # type: ignore[arg-type]
    assert error.value.argument == "degree"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_features_is_refused(name: str) -> None:
    x, y = torch.rand(3, 4), torch.rand(2, 4)
    wrong = [torch.rand(4), torch.rand(0, 4), torch.rand(2, 3, 4), torch.ones(2, 4, dtype=torch.int64)]
    for argument, pairs in {"x": [(bad, y) for bad in wrong], "y": [(x, bad) for bad in [*wrong, y[:, :3]]]}.items():
        for pair in pairs:
            with pytest.raises(InputError) as error:
                PAIRS[name][0](*pair)
            assert error.value.argument == argument


@pytest.mark.parametrize("count", [2, 3, 40, 41])
def test_median_distance_is_scipys(count: int) -> None:
    x = features(count, 5, 9)
    assert median_distance(x) == pytest.approx(np.median(pdist(x.numpy())), rel=1e-12)


def test_median_distance_of_a_subsample() -> None:
    x = features(3000, 5, 9)
    found = median_distance(x, limit=400)
    assert found == median_distance(x, limit=400)
    assert found == pytest.approx(np.median(pdist(x.numpy())), rel=0.05)
    assert found == pytest.approx(median_distance(x.float(), limit=400), rel=1e-6)


def test_median_distance_of_equal_rows_is_zero() -> None:
    assert median_distance(torch.rand(1, 50).repeat(9, 1)) == 0


def test_median_distance_refuses_one_row() -> None:
    with pytest.raises(InputError) as error:
        median_distance(torch.rand(1, 3))
    assert error.value.argument == "x"
    with pytest.raises(InputError) as error:
        median_distance(torch.rand(3, 3), limit=1)
    assert error.value.argument == "limit"


def test_import_brings_no_network_and_no_judge() -> None:
    program = """
import sys, torch
before = set(sys.modules)
from engine.comparison.distances import kernels, mmd
assert callable(mmd)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(*sorted(name for name in sys.modules if name.startswith("engine.")))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packages, modules = (set(line.split()) for line in ran.stdout.splitlines())
    assert not packages & {"torchvision", "torch_fidelity", "sklearn", "scipy", "triton", "matplotlib", "kernels"}
    assert all(name.startswith(("engine.comparison", "engine.support")) for name in modules)
