"""Products of rows on a CPU, against float64: every layout, every dtype, and with a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import relative_error
from torch import Tensor

from kernels.products import add_product_, row_products

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t.contiguous(),
    "columns": lambda t: t.T.contiguous().T,
    "part of wider rows": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "part of longer columns": lambda t: torch.cat([t, t]).T.contiguous().T[: len(t)],
}
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    random = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=random)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (64, 130, 33), (3, 1, 2500)], ids=str)
def test_products_and_sums(draw: Callable[..., Tensor], shape: tuple[int, int, int], layout: str, dtype) -> None:
    """`add_product_` of more columns than it takes at a time is among the shapes."""
    rows, others, features = shape
    x, y, bias, start = draw(rows, features), draw(others, features), draw(others), draw(rows, features)
    factors = draw(rows, others)
    lay = LAYOUTS[layout]
    own, other, factor = (lay(t.to(dtype)) for t in (x, y, factors))
    with torch.no_grad():
        found = row_products(own, other)
        shifted = row_products(own, other, bias.to(dtype))
        total = start.to(dtype, copy=True)
        add_product_(total, factor, other)
    assert found.shape == (rows, others)
    assert relative_error(found, x @ y.T) < TOLERANCE[dtype]
    assert relative_error(shifted, x @ y.T + bias) < TOLERANCE[dtype]
    assert relative_error(total, start + factors @ y) < TOLERANCE[dtype]


@pytest.mark.parametrize("empty", [(0, 4, 3), (4, 0, 3), (4, 5, 0)], ids=str)
def test_nothing_to_multiply(empty: tuple[int, int, int]) -> None:
    rows, others, features = empty
    x, y, total = torch.ones(rows, features), torch.ones(others, features), torch.ones(rows, features)
    assert torch.equal(row_products(x, y), torch.zeros(rows, others))
    add_product_(total, torch.ones(rows, others), y)
    assert torch.equal(total, torch.ones(rows, features))


def test_the_gradient_is_there_where_it_is_wanted(draw: Callable[..., Tensor]) -> None:
    x, y = draw(4, 3).float().requires_grad_(), draw(5, 3).float()
    row_products(x, y).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, y.double().sum(dim=0).expand(4, 3)) < 1e-6
