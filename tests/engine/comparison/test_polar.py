"""Sums of singular values and polar factors, of matrices made with known singular vectors and values."""

from __future__ import annotations

import pytest
import torch
from test_distances_kernels import features
from torch import Tensor

from engine.comparison.distances import polar
from engine.comparison.distances.polar import nuclear_norm_


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] with orthonormal columns."""
    return torch.linalg.qr(features(rows, columns, seed))[0]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (6, 1), (7, 7), (9, 20), (20, 9)])
@pytest.mark.parametrize("decades", [0, 2, 5])
def test_value_and_factor_of_known_singular_values(n: int, m: int, decades: int) -> None:
    k = min(n, m)
    left, right = orthonormal(n, k, 1), orthonormal(m, k, 2)
    values = torch.logspace(0, -decades, k).double()
    matrix = 1e200 * (left * values @ right.T)  # whose square would overflow
    total = nuclear_norm_(matrix)
    torch.testing.assert_close(total, 1e200 * values.sum(), rtol=1e-13, atol=0)
    # Singular vectors are known to eps over the singular value.
    torch.testing.assert_close(matrix, left @ right.T, rtol=0, atol=1e-14 * 10**decades)


@pytest.mark.parametrize("columns", [3, 512])
def test_as_exact_as_lapack_over_nine_decades(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polar, "_COLUMNS", columns)
    left, right = orthonormal(60, 60, 1), orthonormal(130, 60, 2)
    values = torch.logspace(0, -9, 60).double()
    matrix = left * values @ right.T
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    of_lapack = float((u @ vh - left @ right.T).abs().max())
    total = nuclear_norm_(matrix)
    torch.testing.assert_close(total, values.sum(), rtol=1e-13, atol=0)
    assert float((matrix - left @ right.T).abs().max()) <= 10 * of_lapack
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(60).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("n", "m"), [(8, 12), (12, 8)])
def test_singular_values_of_0_are_left_out(n: int, m: int) -> None:
    left, right = orthonormal(n, 3, 1), orthonormal(m, 3, 2)
    matrix = left * torch.tensor([5.0, 5.0, 1e-3], dtype=torch.float64) @ right.T
    torch.testing.assert_close(nuclear_norm_(matrix).item(), 10.001, rtol=1e-12, atol=0)
    torch.testing.assert_close(matrix, left @ right.T, rtol=0, atol=1e-10)
    nothing = torch.zeros(n, m, dtype=torch.float64)
    assert nuclear_norm_(nothing).item() == 0
    assert not nothing.any()


def test_no_number_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run ends with the line that its loss is not finite, and not with LAPACK's error."""
    matrix = features(3, 4, 1)
    matrix[1, 1] = torch.inf
    assert nuclear_norm_(matrix).isnan()
    assert matrix.isnan().all()

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    matrix = features(3, 4, 1)
    assert nuclear_norm_(matrix).isnan()
    assert matrix.isnan().all()
