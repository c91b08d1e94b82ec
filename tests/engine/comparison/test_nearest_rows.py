"""Nearest rows in blocks, against scikit-learn."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from engine.comparison.distances import nearest as module
from engine.comparison.distances.nearest import nearest_rows
from kernels import reference


@pytest.mark.parametrize(("n", "m", "features"), [(1, 1, 1), (7, 13, 3), (64, 31, 8), (33, 97, 200)])
def test_all_rows_are_compared(n: int, m: int, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 8)
    random = torch.Generator().manual_seed(n)
    x, y = (torch.randn(count, features, generator=random, dtype=torch.float64) + 3 for count in (n, m))
    index, squares = nearest_rows(x, y)
    distance, expected = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(y).kneighbors(x)
    assert index.tolist() == expected[:, 0].tolist()
    np.testing.assert_allclose(squares, distance[:, 0] ** 2, rtol=1e-10)


def test_of_equal_rows_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 4)
    y = torch.arange(5.0).repeat(4).unsqueeze(1)
    index, squares = nearest_rows(torch.tensor([[2.0], [4.0]]), y)
    assert (index.tolist(), squares.tolist()) == ([2, 4], [0, 0])


def test_the_backend_that_is_asked_for_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 4)
    asked: list[int] = []

    def counted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(y))
        return reference.nearest(x, y)

    x, y = torch.randn(3, 2), torch.randn(9, 2)
    index, _ = nearest_rows(x, y, SimpleNamespace(nearest=counted))
    assert asked == [4, 4, 1]
    assert index.tolist() == torch.cdist(x, y).argmin(dim=1).tolist()
    with pytest.raises(ValueError, match="kernels: 'nothing' is not one of"):
        nearest_rows(x, y, "nothing")


@pytest.mark.slow
def test_a_large_pool_of_images_takes_little_memory() -> None:
    """16,384 images of 32×32 pixels among 65,536 in at most 2 GiB, the images among them."""
    code = """
        import resource, torch
        from engine.comparison.distances.nearest import nearest_rows
        random = torch.Generator().manual_seed(0)
        nearest_rows(torch.randn(10, 3072), torch.randn(10, 3072))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        y = torch.randn(65_536, 3072, generator=random)
        chosen = torch.randint(65_536, (16_384,), generator=random)
        x = y[chosen].mul_(1.01)
        index, _ = nearest_rows(x, y)
        assert torch.equal(index, chosen)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=1200
    )
    assert int(found.stdout) < 2 * 2**30
