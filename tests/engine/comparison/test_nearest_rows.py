"""Nearest rows in blocks, against scikit-learn."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from engine.comparison.distances import nearest as module
from engine.comparison.distances.nearest import nearest_rows


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
