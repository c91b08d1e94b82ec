"""What settings become: the loss of `make_objective` against the distance with these numbers, written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from engine.comparison.averagers import AMA, MovingAverage, NoAverage
from engine.comparison.distances import Sinkhorn, drifting
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.populations import MovingPopulation, QueuedPopulation
from engine.comparison.reference.bank import FeatureBank
from engine.configuration.config import Config
from engine.configuration.objectives import make_averager, make_objective
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.support.errors import InputError

M, N = 30, 6


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    torch.manual_seed(0)
    return build_extractor("vgg-small", image_size=8, layers=2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(M + N, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def features(extractor: Extractor, images: Tensor) -> list[Tensor]:
    """Means over positions, one [n, C] for every tap."""
    maps = extractor.features(images).split([tap.num_features for tap in extractor.taps], dim=1)
    return [part.unflatten(1, tap.shape).mean(dim=(2, 3)) for part, tap in zip(maps, extractor.taps, strict=True)]


def configured(method: str, **given: Any) -> Config:
    settings = {"image_size": 8, "layers": 2, "weights": ("random",), "kernels": "reference", "extractor": "vgg-small"}
    pooled = {} if method == "gfmn" else {"pool": "mean"}
    return Config.build("digits", {"method": method, **settings, **pooled, "batch_size": N, **given})


def squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return cdist(x, y, "sqeuclidean")


def gaussians(*widths: float):
    return lambda x, y: sum(np.exp(-squares(x, y) / (2 * width**2)) for width in widths)


def squared_mmd(kernel: Any, x: np.ndarray, y: np.ndarray, *, unbiased: bool = False) -> float:
    def mean(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) if unbiased else k.mean()

    return mean(kernel(x, x)) + mean(kernel(y, y)) - 2 * kernel(x, y).mean()


def of_sinkhorn(x: np.ndarray, y: np.ndarray) -> float:
    return float(Sinkhorn(torch.from_numpy(y), 0.3, 4, tolerance=None)(torch.from_numpy(x)))


def of_drifting(x: np.ndarray, y: np.ndarray) -> float:
    return float(drifting(torch.from_numpy(x), torch.from_numpy(y), (0.3, 0.7)))


KERNELS: dict[str, tuple[dict[str, Any], Any]] = {
    "gaussian": ({"mmd_bandwidths": (0.4, 3.0)}, gaussians(0.4, 3.0)),
    "rational-quadratic": ({"mmd_bandwidths": (0.3, 4.0)}, lambda x, y: sum(
        (1 + squares(x, y) / (2 * alpha)) ** -alpha for alpha in (0.3, 4.0)
    )),
    "imq": ({"mmd_bandwidths": (0.2, 5.0)}, lambda x, y: sum(c / (c + squares(x, y)) for c in (0.2, 5.0))),
    "polynomial": ({"mmd_degree": 2}, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 2),
    "energy": ({}, lambda x, y: -cdist(x, y)),
}  # fmt: skip
# Name → settings, and what they mean for features of which the median distance of real ones is 1.
DISTANCES: dict[str, tuple[dict[str, Any], Any]] = {
    **{
        f"mmd, {name}": ({"method": "mmd", "mmd_kernel": name, **given}, lambda x, y, k=kernel: squared_mmd(k, x, y))
        for name, (given, kernel) in KERNELS.items()
    },
    "mmd, unbiased": (
        {"method": "mmd", "mmd_kernel": "gaussian", "mmd_bandwidths": (0.4,), "mmd_unbiased": True},
        lambda x, y: squared_mmd(gaussians(0.4), x, y, unbiased=True),
    ),
    "sinkhorn": ({"method": "sinkhorn", "sinkhorn_epsilon": 0.3, "sinkhorn_iterations": 4}, of_sinkhorn),
    "drifting": ({"method": "drifting", "drifting_temperatures": (0.3, 0.7)}, of_drifting),
}


def loss(extractor: Extractor, images: Tensor, config: Config) -> float:
    parts = features(extractor, images[:M])
    bank = FeatureBank(torch.cat(parts, dim=1), torch.arange(M), [part.shape[1] for part in parts])
    with torch.no_grad():
        return float(make_objective(config, extractor, bank, None)(images[M:]))


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_have_the_numbers_that_are_given(name: str, extractor: Extractor, images: Tensor) -> None:
    given, distance = DISTANCES[name]
    parts = [part.double().numpy() for part in features(extractor, images)]
    x = np.concatenate([part / np.sqrt(part[:M].var(axis=0).sum()) for part in parts], axis=1)
    x /= np.median(pdist(x[:M]))
    found = loss(extractor, images, configured(**given))
    assert found == pytest.approx(distance(x[M:], x[:M]), rel=1e-3)


def test_gmmn_s_bandwidths_grow_with_the_number_of_features(extractor: Extractor, images: Tensor) -> None:
    """They are those of exp(−d²/(2σ)), for 784 pixels; features are not scaled."""
    x = torch.cat(features(extractor, images), dim=1).double().numpy()
    widths = [(sigma * x.shape[1] / 784) ** 0.5 for sigma in (0.5, 2.0)]
    expected = (squared_mmd(gaussians(*widths), x[M:], x[:M]) + 1e-8) ** 0.5
    config = configured("gmmn", gmmn_bandwidths=(0.5, 2.0))
    assert loss(extractor, images, config) == pytest.approx(expected, rel=1e-3)


def test_gmmn_of_images_that_coincide_is_finite() -> None:
    """Rounding leaves the sum of their kernels below 0, of which there is no root."""
    pixels = build_extractor("pixels", image_size=32)
    drawn = torch.Generator().manual_seed(2)
    alike = torch.rand(1, 3, 32, 32, generator=drawn) + 2e-4 * torch.randn(320, 3, 32, 32, generator=drawn)
    bank = FeatureBank(pixels.features(alike[:256]), torch.arange(256), [3072])
    images = alike[256:].requires_grad_()
    config = Config.build("digits", {"method": "gmmn", "kernels": "reference", "batch_size": 64})
    loss = make_objective(config, pixels, bank, None)(images)
    assert loss.item() == pytest.approx(0, abs=2e-3)
    (gradient,) = torch.autograd.grad(loss, images)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "given", [{"method": "frechet"}, {"method": "frechet", "population": "ema"}, {"method": "mmd"}]
)
def test_real_images_that_are_all_the_same_are_refused(
    given: dict[str, Any], extractor: Extractor, images: Tensor
) -> None:
    with pytest.raises(InputError, match="needs real images that differ") as error:
        loss(extractor, images[:1].expand(M + N, -1, -1, -1), configured(**given))
    assert error.value.argument == "data"


def test_averagers_have_the_numbers_that_are_given() -> None:
    def made(**given: Any) -> Any:
        return make_averager(Config.build("digits", {"batch_size": 8, **given}))

    ama = made(averager="ama", ama_lr=0.02, ama_variant="authors", seed=5)
    assert isinstance(ama, AMA)
    assert (ama.rate, ama.variant, ama.seed) == (0.02, "authors", 5)
    average = made(averager="ma", ma_alpha=0.3, ma_variant="authors")
    assert isinstance(average, MovingAverage)
    assert (average.rate, average.variant) == (0.3, "authors")
    assert isinstance(made(averager="none"), NoAverage)
    moving = made(population="ema", population_decay=0.7)
    assert isinstance(moving, MovingPopulation)
    assert moving.decay == 0.7
    queue = made(population="queue", population_images=24)
    assert isinstance(queue, QueuedPopulation)
    assert queue.minibatches == 3


@pytest.mark.parametrize("scale", ["none", "target-deviation"])
def test_features_are_scaled_as_asked(scale: str, extractor: Extractor, images: Tensor) -> None:
    """By the written-out loss of GFMN without an average: Σ w²Δμ² + Σ w⁴Δσ² of features that count w times."""
    real, drawn = (extractor.features(part).double() for part in (images[:M], images[M:]))
    config = configured("gfmn", feature_scale=scale, averager="none")
    objective = make_objective(config, extractor, Moments.of(real), None)
    assert isinstance(objective, MomentMatching)
    deviation = real.std(dim=0, correction=1)
    w = 1 / (deviation + 0.05 * deviation.mean()) if scale == "target-deviation" else torch.ones_like(deviation)
    means, variances = (w * (real.mean(dim=0) - drawn.mean(dim=0))), w**2 * (real.var(dim=0) - drawn.var(dim=0))
    with torch.no_grad():
        found = float(objective(images[M:]))
    assert found == pytest.approx(float(means.square().sum() + variances.square().sum()), rel=1e-3)
