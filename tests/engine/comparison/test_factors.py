"""Trapezoidal factors of covariances: BᵀB against what they were made of."""

from __future__ import annotations

import pytest
import torch
from test_distances_kernels import features
from torch import Tensor

from engine.comparison.distances import Frechet, factors, frechet
from engine.comparison.distances.factors import Factor


def dense(factor: Factor) -> Tensor:
    return factor.lift(torch.eye(factor.rank, dtype=torch.float64))


def cholesky(covariance: Tensor) -> Factor | None:
    return Factor.of_covariance(lambda part: covariance[part].clone(), len(covariance))


def covariance_of(size: int, rank: int, decades: float) -> Tensor:
    values = torch.zeros(size, dtype=torch.float64)
    values[:rank] = torch.logspace(0, -decades, rank).double()
    turn = torch.linalg.qr(features(size, size, 3))[0]
    return turn * values @ turn.T


@pytest.mark.parametrize("rows", [4, 256])
@pytest.mark.parametrize(
    ("size", "rank", "decades"), [(1, 1, 0), (4, 4, 0), (13, 13, 6), (13, 7, 0), (16, 8, 3), (30, 30, 9), (9, 0, 0)]
)
def test_covariance(size: int, rank: int, decades: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_ROWS", rows)
    covariance = covariance_of(size, rank, decades)
    found = cholesky(covariance)
    assert found is not None
    assert found.rank == rank
    torch.testing.assert_close(dense(found).T @ dense(found), covariance, rtol=0, atol=1e-14)
    assert sum(block.numel() for block in found.blocks) <= rank * (size + 1) - rank * (rank + 1) // 2 + rank * rows
    x = features(5, size, 1)
    torch.testing.assert_close(found.project(x, x.new_empty(5, rank)), x @ dense(found).T, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rows", [4, 256])
@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 9), (9, 9), (7, 12)])
def test_rows(count: int, size: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "_ROWS", rows)
    matrix, x = features(count, size, 1), features(5, size, 2)
    found = Factor.of_rows(matrix.clone())
    torch.testing.assert_close(dense(found).T @ dense(found), matrix.T @ matrix, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.project(x, x.new_empty(5, count)), x @ dense(found).T, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("values", [[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, -1e-9]], [[1.0, 2.0], [2.0, 1.0]]])
def test_negative_eigenvalues_are_noticed(values: list[list[float]]) -> None:
    assert cholesky(torch.tensor(values).double()) is None


def test_negative_eigenvalues_that_are_rounding_count_as_0() -> None:
    """A covariance in float32 has them; then its eigenvectors are taken, without those."""
    y, x = features(40, 12, 1), features(9, 12, 2)
    y[:, 6:] = y[:, :6] @ features(6, 6, 4)
    covariance = torch.cov(y.T).float()
    assert cholesky(covariance.double()) is None
    found = Frechet(y.mean(dim=0).float(), covariance)(x)
    torch.testing.assert_close(found, frechet(x, y), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("count", "size"), [(30, 7), (5, 7)])
def test_scales_are_those_of_all_features(count: int, size: int) -> None:
    y, x = features(count, size, 1), features(9, size, 2).requires_grad_()
    scales = torch.linspace(0.1, 3, size).double()
    mean, m2 = y.mean(dim=0), torch.cov(y.T) * (count - 1)
    expected = frechet(x * scales, y * scales)
    (gradient,) = torch.autograd.grad(expected, x)
    moments = (x.detach().mean(dim=0), torch.cov(x.detach().T))
    for bound in (Frechet.of(y, scales), Frechet(mean, m2, scales, images=count)):
        found = bound(x)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, x)[0], gradient, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(bound.of_moments(*moments), expected.detach(), rtol=1e-6, atol=0)
