"""Drifting against the loops of its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from test_distances_kernels import features
from torch import Tensor

from engine.comparison.distances import drifting
from engine.support.errors import InputError


def looped_field(x: Tensor, y: Tensor, temperatures: tuple[float, ...], floor: float) -> tuple[Tensor, float]:
    """V [n, F] and s/√F, a pair of images at a time, as the paper and its authors' code say it."""
    targets = [*x, *y]
    n, size = x.shape
    apart = [[0.0 if i == j else math.dist(x[i], target) for j, target in enumerate(targets)] for i in range(n)]
    scale = sum(sum(row) for row in apart) / (n * len(targets))
    unit = scale / math.sqrt(size)
    field = torch.zeros_like(x)
    for temperature in temperatures:
        weights = [
            [0.0 if i == j else math.exp(-apart[i][j] / scale / temperature) for j in range(len(targets))]
            for i in range(n)
        ]
        rows = [sum(row) for row in weights]
        columns = [sum(weights[i][j] for i in range(n)) for j in range(len(targets))]
        force = torch.zeros_like(x)
        for i in range(n):
            affinity = [
                math.sqrt(max(weights[i][j] / rows[i] * (weights[i][j] / columns[j]), floor))
                for j in range(len(targets))
            ]
            for real in range(n, len(targets)):
                for generated in range(n):
                    pull = affinity[real] * affinity[generated]
                    force[i] += pull * (targets[real] - targets[generated]) / unit
        field += force / max(float(force.square().mean()), 1e-8) ** 0.5
    return field, unit


@pytest.mark.parametrize("floor", [1e-6, 0.0])
@pytest.mark.parametrize("temperatures", [(0.02, 0.05, 0.2), (0.5,)], ids=str)
@pytest.mark.parametrize(("n", "m", "size"), [(2, 1, 1), (3, 5, 4), (7, 4, 3), (6, 11, 17)])
def test_value_and_gradient_are_the_loops(
    n: int, m: int, size: int, temperatures: tuple[float, ...], floor: float
) -> None:
    x, y = features(n, size, 1), features(m, size, 2)
    field, unit = looped_field(x, y, temperatures, floor)
    x.requires_grad_(), y.requires_grad_()
    found = drifting(x, y, temperatures, floor)
    assert found.shape == ()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, field.square().mean(), rtol=1e-9, atol=0)
    of_x, of_y = torch.autograd.grad(3 * found, (x, y), allow_unused=True)
    torch.testing.assert_close(of_x, -6 * field / (unit * n * size), rtol=1e-8, atol=1e-10)
    assert of_y is None


def test_steps_along_the_gradient_bring_the_sets_together() -> None:
    x, y = features(20, 2, 1) + 3, features(30, 2, 2)
    for _ in range(200):
        x = x.detach().requires_grad_()
        x = x - 0.3 * torch.autograd.grad(drifting(x, y), x)[0]
    assert float((x.detach().mean(dim=0) - y.mean(dim=0)).abs().max()) < 0.3
    assert x.detach().std(dim=0).min() > 0.3 * y.std(dim=0).min()


def test_a_shift_and_a_scale_of_both_sets_change_nothing() -> None:
    x, y = features(6, 5, 1), features(7, 5, 2)
    expected = drifting(x, y)
    torch.testing.assert_close(drifting(40 * x + 1000, 40 * y + 1000), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_arithmetic_is_float32_at_least(dtype: torch.dtype) -> None:
    x, y = features(12, 9, 1).to(dtype).requires_grad_(), features(7, 9, 2).to(dtype)
    expected = drifting(x.detach().double(), y.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = drifting(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    assert torch.autograd.grad(found, x)[0].dtype == dtype


def test_duplicates_and_features_in_one_place_have_a_finite_gradient() -> None:
    x = features(4, 3, 1)
    for own, other in ((x[[0, 0, 1, 1]], x[[0, 2]]), (torch.ones(3, 2), torch.ones(4, 2))):
        leaf = own.clone().requires_grad_()
        assert torch.autograd.grad(drifting(leaf, other.to(leaf)), leaf)[0].isfinite().all()


X, Y = torch.rand(3, 4), torch.rand(2, 4)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: drifting(X[:1], Y), "x"),
    (lambda: drifting(X, Y[:0]), "y"),
    (lambda: drifting(X, Y[:, :3]), "y"),
    (lambda: drifting(X, Y, ()), "temperatures"),
    *((lambda value=value: drifting(X, Y, (0.2, value)), "temperatures") for value in (0.0, -1.0, math.nan, math.inf)),
    (lambda: drifting(X, Y, affinity_floor=-1e-6), "affinity_floor"),
]


@pytest.mark.parametrize(("call", "argument"), BAD)
def test_bad_input_is_named(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert error.value.argument == argument
