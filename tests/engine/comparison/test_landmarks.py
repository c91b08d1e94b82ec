"""MMD² by landmarks against MMD² itself where all images are landmarks, and against a projection by NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics.pairwise import pairwise_kernels
from test_distances_kernels import features
from torch import Tensor

from engine.comparison.distances import MMD, LandmarkMMD, choose_landmarks, kernels
from engine.comparison.distances.kernels import Kernel
from engine.support.errors import InputError

KERNELS: dict[str, Kernel] = {
    "gaussian": kernels.gaussian((0.5, 2.0)),
    "rational-quadratic": kernels.rational_quadratic(),
    "imq": kernels.imq((0.3, 4.0)),
    "energy": kernels.energy(),
}


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("name", KERNELS)
def test_all_images_as_landmarks_are_mmd(name: str, unbiased: bool) -> None:
    x, y = features(6, 5, 1).requires_grad_(), features(11, 5, 2)
    found = LandmarkMMD(y, KERNELS[name], landmarks=11, unbiased=unbiased, ridge=0)
    full = MMD(y, KERNELS[name], unbiased)
    assert found(x).shape == ()
    assert found(x).dtype == torch.float64
    # The real side is one mean embedding: its own pairs are all in its norm.
    constant = MMD(y, KERNELS[name]).constant
    torch.testing.assert_close(found(x), full(x) - full.constant + constant, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(3 * found(x), x), torch.autograd.grad(3 * full(x), x), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize(("n", "m", "count", "size"), [(2, 5, 1, 1), (5, 7, 3, 4), (7, 31, 5, 17)])
def test_value_and_gradient_are_the_projections(n: int, m: int, count: int, size: int, ridge: float) -> None:
    """By scikit-learn's kernel, and weights as NumPy's least squares has them: ‖Σ α k(z) − μ_y‖² + λ k̄ ‖α‖²."""
    x, y, points = features(n, size, 1), features(m, size, 2), features(count, size, 3)

    def kernel(one: Tensor, other: Tensor) -> np.ndarray:
        return sum(pairwise_kernels(one, other, metric="rbf", gamma=1 / (2 * s**2)) for s in (0.5, 2.0))

    values, vectors = np.linalg.eigh(kernel(points, points))
    root = vectors * np.sqrt(values) @ vectors.T
    target = np.linalg.lstsq(root, kernel(points, y).mean(axis=1), rcond=None)[0]
    rows = np.concatenate([root, np.sqrt(ridge * 2.0) * np.eye(count)])  # k(z, z) = 2, one of each width
    weights = np.linalg.lstsq(rows, np.concatenate([target, np.zeros(count)]), rcond=None)[0]
    expected = (
        kernel(x, x).mean() - 2 * kernel(x, points).mean(axis=0) @ weights + weights @ kernel(points, points) @ weights
    )
    bound = LandmarkMMD(y, KERNELS["gaussian"], landmarks=points, ridge=ridge)
    np.testing.assert_allclose(bound.weights, weights, rtol=1e-7, atol=1e-9)
    leaf = x.requires_grad_()
    assert bound(leaf).item() == pytest.approx(expected, rel=1e-8, abs=1e-10)
    assert torch.autograd.gradcheck(bound, (leaf,))
    assert torch.autograd.gradgradcheck(bound, (leaf,))


@pytest.mark.parametrize("name", KERNELS)
def test_more_landmarks_come_nearer(name: str) -> None:
    x, y = features(40, 2, 1), features(200, 2, 2)
    exact = MMD(y, KERNELS[name])(x).item()
    errors = [abs(LandmarkMMD(y, KERNELS[name], count)(x).item() - exact) for count in (3, 12, 80)]
    assert errors[2] < errors[0]
    assert errors[2] < 0.02 * exact


def test_energys_weights_sum_to_one() -> None:
    """Else the distance from far away would not be finite; the last landmark has what is left."""
    bound = LandmarkMMD(features(50, 3, 1), kernels.energy(), landmarks=7)
    assert bound.landmarks.shape == (8, 3)
    assert bound.weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert bound(features(9, 3, 2)).item() > 0
    assert bound(features(9, 3, 2) + 1e4).item() == pytest.approx(2e4 * 3**0.5, rel=1e-2)


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("name", KERNELS)
def test_landmarks_and_weights_are_all_that_is_needed(name: str, unbiased: bool) -> None:
    x, y = features(9, 4, 1).float(), features(60, 4, 2).float()
    bound = LandmarkMMD(y, KERNELS[name], 20, unbiased)
    again = LandmarkMMD.of_weights(bound.landmarks, bound.weights, KERNELS[name], unbiased)
    assert torch.equal(again(x), bound(x))


@pytest.mark.parametrize("name", KERNELS)
def test_no_distance_is_negative(name: str) -> None:
    y = features(60, 4, 1)
    for ridge in (1e-9, 1e-6, 1e-2):
        bound = LandmarkMMD(y, KERNELS[name], landmarks=20, ridge=ridge)
        assert bound(y).item() > -1e-9
        assert bound(bound.landmarks).item() > -1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", KERNELS)
def test_arithmetic_is_float32_at_least(name: str, dtype: torch.dtype) -> None:
    x, y = (features(12, 9, 1) + 5).to(dtype).requires_grad_(), (features(90, 9, 2) + 5).to(dtype)
    bound = LandmarkMMD(y, KERNELS[name], landmarks=20)
    assert bound.landmarks.dtype == torch.float32
    exact = LandmarkMMD(y.double(), KERNELS[name], landmarks=bound.landmarks[:20].double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bound(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact(x.double()), rtol=1e-3, atol=1e-5)
    assert torch.autograd.grad(found, x)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_landmarks_are_scikit_learns_means(dtype: torch.dtype) -> None:
    """Repeatable, and nearer to the images than as many images drawn at random."""
    y = torch.cat([features(80, 3, seed) + 4 * seed for seed in range(5)]).to(dtype)
    found = choose_landmarks(y, 13, seed=7)
    assert found.shape == (13, 3)
    assert found.dtype == dtype
    assert torch.equal(found, choose_landmarks(y, 13, seed=7))
    assert not torch.equal(found, choose_landmarks(y, 13, seed=8))
    expected = KMeans(13, n_init=1, max_iter=20, random_state=7).fit(y.numpy()).cluster_centers_
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    def spread(points: Tensor) -> float:
        return float(torch.cdist(y, points).min(dim=1).values.square().mean())

    assert spread(found) < 0.7 * spread(y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:13]])


def test_landmarks_of_a_subsample_are_among_its_rows() -> None:
    y = torch.randn(500, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = choose_landmarks(y, 20, limit=20 + 1)
    assert torch.equal(found, choose_landmarks(y, 20, limit=20 + 1))
    nearest = torch.cdist(found, y).min(dim=1).values
    assert int((nearest < 1e-6).sum()) >= 19  # 21 rows in 20 groups: at most one group has two


def test_landmarks_of_duplicates_are_distinct() -> None:
    y = features(3, 4, 1).repeat(20, 1)
    found = choose_landmarks(y, 10)
    assert 3 <= len(found) <= 10
    assert len(found) == len(found.unique(dim=0))
    x = features(5, 4, 2)
    assert LandmarkMMD(y, KERNELS["gaussian"], 10)(x).item() == pytest.approx(
        MMD(y, KERNELS["gaussian"])(x).item(), rel=1e-4
    )


X, Y = torch.rand(3, 4), torch.rand(6, 4)
GAUSSIAN = KERNELS["gaussian"]
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: LandmarkMMD(Y, GAUSSIAN, landmarks=7), "landmarks"),
    (lambda: LandmarkMMD(Y, GAUSSIAN, landmarks=0), "landmarks"),
    (lambda: LandmarkMMD(Y, GAUSSIAN, landmarks=torch.rand(2, 3)), "landmarks"),
    (lambda: LandmarkMMD(Y, kernels.energy(), landmarks=1), "landmarks"),
    (lambda: LandmarkMMD(Y[0], GAUSSIAN, landmarks=1), "y"),
    (lambda: LandmarkMMD(Y, GAUSSIAN, 3, ridge=-1.0), "ridge"),
    (lambda: LandmarkMMD(Y, GAUSSIAN, Y[[0, 0, 1]], ridge=0.0), "ridge"),
    (lambda: LandmarkMMD(Y, GAUSSIAN, 3)(X[:, :2]), "x"),
    (lambda: LandmarkMMD(Y, GAUSSIAN, 3, unbiased=True)(X[:1]), "x"),
    (lambda: LandmarkMMD.of_weights(Y[0], torch.ones(6), GAUSSIAN), "landmarks"),
    (lambda: LandmarkMMD.of_weights(Y, torch.ones(5), GAUSSIAN), "weights"),
    (lambda: choose_landmarks(Y, 7), "landmarks"),
    (lambda: choose_landmarks(Y, 3, limit=2), "limit"),
    (lambda: choose_landmarks(Y, 3, iterations=0), "iterations"),
]


@pytest.mark.parametrize(("call", "argument"), BAD)
def test_bad_input_is_named(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert error.value.argument == argument
