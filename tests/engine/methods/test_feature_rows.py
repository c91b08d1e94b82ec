"""Rows of pooled features that find the nearest sample, against the extractor's plain features in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.methods.pools import FeatureRows
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.support.errors import InputError

CELLS = 4


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_extractor("vgg-small", image_size=32, layers=3).double()


def images(count: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 32, 32, generator=random, dtype=torch.float64) * 2 - 1


def written_out(extractor: Extractor, x: torch.Tensor) -> np.ndarray:
    """Means over 4 × 4 cells, cell by cell, of every tap of `features`, divided by the root of their number."""
    features, rows = extractor.features(x).numpy(), []
    begun = 0
    for tap in extractor.taps:
        channels, height, width = tap.shape
        maps = features[:, begun : begun + tap.num_features].reshape(len(x), channels, height, width)
        begun += tap.num_features
        down, across = height // CELLS, width // CELLS
        for channel in range(channels):
            for row in range(CELLS):
                for column in range(CELLS):
                    cell = maps[:, channel, row * down : (row + 1) * down, column * across : (column + 1) * across]
                    rows.append(cell.mean(axis=(1, 2)) / np.sqrt(channels * CELLS**2))
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_rows_are_those_written_out(chunk_size: int | None, extractor: Extractor) -> None:
    found = FeatureRows(FeaturePass(extractor, chunk_size=chunk_size, kernels="reference"))(images(3))
    assert not found.requires_grad
    np.testing.assert_allclose(found.numpy(), written_out(extractor, images(3)), rtol=1e-10, atol=1e-12)


def test_batch_statistics_are_refused() -> None:
    network = build_extractor("resnet18", image_size=32, layers=1, bn="batch")
    with pytest.raises(InputError) as error:
        FeatureRows(FeaturePass(network, kernels="reference"))
    assert error.value.argument == "extractor"
