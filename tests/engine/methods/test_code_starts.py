"""Codes begin at the images' principal components: scikit-learn's, scaled to the ball."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers.small_steps import configuration, few_pictures
from helpers.thread_ranks import on_ranks
from sklearn.decomposition import PCA
from torch import Tensor

from engine.configuration.build import of_images
from engine.methods.code_starts import principal_codes
from engine.support.errors import InputError
from engine.training.ranks import Ranks

NUMBERS = torch.randperm(40, generator=torch.Generator().manual_seed(1))


def images(size: int) -> Tensor:
    """40 images whose variance differs by direction."""
    random = torch.Generator().manual_seed(0)
    factor = torch.randn(3 * size * size, 12, generator=random) * torch.linspace(0.05, 1, 12)
    return (torch.randn(40, 12, generator=random) @ factor.T).view(40, 3, size, size) + 0.3


def batches(pictures: Tensor, size: int) -> Sequence[tuple[Tensor, Tensor]]:
    """Image number i of the data set is pictures[i], read in another order."""
    return [(pictures[part], part) for part in torch.split(NUMBERS[: len(pictures)], size)]


@pytest.mark.parametrize(("size", "radius"), [(6, 1.0), (32, 2.5)])
def test_codes_are_whitened_components(size: int, radius: float) -> None:
    pictures = images(size)
    codes = principal_codes(batches(pictures, 7), 40, 5, radius=radius).double().numpy()
    cells = pictures.double().numpy()
    if size == 32:
        cells = cells.reshape(40, 3, 16, 2, 16, 2).mean(axis=(3, 5))
    expected = PCA(5, whiten=True, svd_solver="full").fit_transform(cells.reshape(40, -1))
    norms = np.linalg.norm(expected, axis=1, keepdims=True)
    expected *= radius / np.maximum(np.quantile(norms, 0.9), norms)
    signs = np.sign((expected * codes).sum(axis=0))
    np.testing.assert_allclose(codes, expected * signs, rtol=1e-5, atol=1e-6)
    assert ((np.linalg.norm(codes, axis=1) < radius * (1 - 1e-6)).sum()) == 36


def test_minibatches_decide_nothing() -> None:
    pictures = images(6)
    one, other = (principal_codes(batches(pictures, size), 40, 5) for size in (40, 9))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_what_does_not_vary_is_0() -> None:
    """Images on a line have one component; images that are all alike have none, and so has one that was not read."""
    line = torch.linspace(-1, 1, 40)[:, None] * torch.randn(1, 3 * 36, generator=torch.Generator().manual_seed(2))
    codes = principal_codes(batches(line.view(40, 3, 6, 6), 8), 41, 4)
    assert float(codes[:40, 0].abs().max()) > 0.9
    assert not codes[:, 1:].any()
    assert not codes[40].any()
    assert not principal_codes(batches(torch.full((40, 3, 6, 6), 0.2), 8), 40, 4).any()


def test_more_dimensions_than_numbers() -> None:
    with pytest.raises(InputError, match="at most 12 dimensions, got 13"):
        principal_codes(batches(images(2), 8), 40, 13)


def test_all_ranks_begin_with_the_codes_of_one() -> None:
    config = configuration("digits", {"method": "glo", "code_start": "pca"})
    dataset = few_pictures(config)

    def start(ranks: Ranks) -> Tensor:
        found: Tensor = of_images(config, dataset, ranks)["start"]
        return found

    (alone,) = on_ranks(1, start)
    assert alone.any()
    for found in on_ranks(3, start):
        assert torch.equal(found, alone)
