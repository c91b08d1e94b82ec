"""A kernel's value and mixed derivatives at equal points, against automatic differentiation of a single pair."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_pairs import PAIRS, Pair

from engine.comparison.distances import kernels
from engine.comparison.distances.diagonals import diagonal
from engine.comparison.distances.kernels import Kernel, Sum

_GAUSSIAN, _POLYNOMIAL = PAIRS["gaussian"], PAIRS["polynomial"]
CASES: dict[str, tuple[Kernel, Pair]] = {
    **{name: case for name, case in PAIRS.items() if name != "energy"},
    "polynomial of degree 1": (kernels.polynomial(1), lambda x, y: (x * y).sum() / len(x) + 1),
    "polynomial of degree 2": (kernels.polynomial(2), lambda x, y: ((x * y).sum() / len(x) + 1) ** 2),
    "two polynomials": (
        Sum((kernels.polynomial(2), _GAUSSIAN[0], _POLYNOMIAL[0])),
        lambda x, y: ((x * y).sum() / len(x) + 1) ** 2 + _GAUSSIAN[1](x, y) + _POLYNOMIAL[1](x, y),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_diagonals_are_derivatives(name: str) -> None:
    kernel, pair = CASES[name]
    points = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = diagonal(kernel, points)
    for row, point in enumerate(points):
        mixed = torch.func.jacrev(torch.func.jacrev(pair, 0), 1)(point, point)
        expected = found.slope[row] * torch.eye(3, dtype=torch.float64)
        if found.along is not None:
            expected = expected + found.along[row] * torch.outer(point, point)
        torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.value[row], pair(point, point), rtol=1e-12, atol=1e-12)


def test_half_precision_becomes_float32() -> None:
    points = torch.randn(4, 3)
    for kernel, _ in CASES.values():
        found = diagonal(kernel, points.bfloat16())
        assert found.value.dtype == found.slope.dtype == torch.float32
