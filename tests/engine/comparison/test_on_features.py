"""Distances of pooled features as an objective, against autograd on the whole feature matrix in float64."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from helpers.objectives import run_step
from helpers.rank_worker import DISTANCES
from oracle import in_float64, relative_error
from torch import Tensor

from engine.comparison.distances import MMD, kernels
from engine.comparison.on_features import FeatureCriterion, OfNetworks, OnFeatures
from engine.comparison.pooling import POOLS, make_pool, sizes
from engine.comparison.reference.bank import BankKind, FeatureBank
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.support.errors import InputError
from engine.training.ranks import ALONE
from pipelines import ImageLoader, open_dataset

IMAGES = 7


def of_pair(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Every kernel written out for one pair."""
    d2 = (x - y).square().sum()
    if name == "gaussian":
        return sum(torch.exp(-d2 / (2 * s**2)) for s in (0.5, 2.0))
    if name == "rational-quadratic":
        return sum((1 + d2 / (2 * a)) ** -a for a in (0.2, 0.5, 1, 2, 5))
    if name == "imq":
        return sum(c / (c + d2) for c in (0.3, 3.0))
    if name == "polynomial":
        return ((x * y).sum() / len(x) + 1) ** 3
    if name == "linear":
        return (x * y).sum()
    # The gradient of −‖x−y‖ at x = y counts as 0.
    return -d2.sqrt() if d2 > 0 else 0 * d2


def by_hand(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Every kernel, pair by pair, [n, m]."""
    return torch.stack([torch.stack([of_pair(name, one, other) for other in y]) for one in x])


KERNELS = {
    "gaussian": kernels.gaussian((0.5, 2.0)),
    "rational-quadratic": kernels.rational_quadratic(),
    "imq": kernels.imq((0.3, 3.0)),
    "polynomial": kernels.polynomial(3),
    "linear": kernels.linear(),
    "energy": kernels.energy(),
}


def mmd_by_hand(name: str, x: Tensor, y: Tensor, unbiased: bool) -> Tensor:
    n, m = len(x), len(y)
    within_x, within_y, across = by_hand(name, x, x), by_hand(name, y, y), by_hand(name, x, y)
    if unbiased:
        mean_x = (within_x.sum() - within_x.diagonal().sum()) / (n * (n - 1))
        mean_y = (within_y.sum() - within_y.diagonal().sum()) / (m * (m - 1))
    else:
        mean_x, mean_y = within_x.mean(), within_y.mean()
    return mean_x + mean_y - 2 * across.mean()


def pooled(extractor: Extractor, images: Tensor, pool: str) -> Tensor:
    """Pooled features by the plain path: `extractor.features`, cut into taps, averaged by the book."""
    taps = []
    for part, tap in zip(
        extractor.features(images).split([tap.num_features for tap in extractor.taps], dim=1), extractor.taps
    ):
        y = part.unflatten(1, tap.shape)
        if pool == "mean":
            y = y.mean(dim=(2, 3))
        elif pool == "mean+std":
            means, variances = y.mean(dim=(2, 3)), y.var(dim=(2, 3), correction=0)
            y = torch.cat([means, (variances + 1e-6).sqrt()], dim=1)
        elif pool == "grid4":
            side = min(4, tap.shape[1])
            step = tap.shape[1] // side
            y = y.unfold(2, step, step).unfold(3, step, step).mean(dim=(4, 5))
        taps.append(y.flatten(1))
    return torch.cat(taps, dim=1)


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("name", KERNELS)
def test_mmd_and_its_gradient_for_every_chunk(name, unbiased, tiny_extractor, draw_images):
    extractor = in_float64(tiny_extractor)
    real = pooled(extractor, draw_images(6), "mean")
    images = draw_images(IMAGES).requires_grad_()
    expected = mmd_by_hand(name, pooled(extractor, images, "mean"), real, unbiased)
    (gradient,) = torch.autograd.grad(expected, images)
    assert float(gradient.abs().max()) > 0
    for chunk in (1, 3, None):
        objective = OnFeatures(extractor, MMD(real, KERNELS[name], unbiased=unbiased), pool="mean", chunk_size=chunk)
        loss, found = run_step(objective, images)
        assert relative_error(loss, expected) <= 1e-10
        assert relative_error(found, gradient) <= 1e-10


@pytest.mark.parametrize("recompute", ["none", "stages"])
@pytest.mark.parametrize("pool", POOLS)
def test_pools(pool, recompute, tiny_extractor, draw_images):
    """8×8 and 4×4 maps: the grid of 4 averages the first and keeps the second; and so do stages."""
    extractor = in_float64(tiny_extractor)
    real = pooled(extractor, draw_images(6), pool)
    images = draw_images(IMAGES).requires_grad_()
    expected = mmd_by_hand("rational-quadratic", pooled(extractor, images, pool), real, False)
    (gradient,) = torch.autograd.grad(expected, images)
    discrepancy = MMD(real, KERNELS["rational-quadratic"])
    for chunk in (2, None):
        objective = OnFeatures(extractor, discrepancy, pool=pool, chunk_size=chunk, recompute=recompute)
        loss, found = run_step(objective, images)
        assert relative_error(loss, expected) <= 1e-10
        assert relative_error(found, gradient) <= 1e-10


@pytest.mark.parametrize("shape", [(5, 7, 7), (3, 2, 2), (4, 5, 3), (6, 1, 1)], ids=str)
@pytest.mark.parametrize("pool", [*POOLS, "grid1", "grid3"])
def test_gradient_of_pools_is_autograd_s(pool, shape):
    """Maps that a grid of 4 does not divide, and smaller ones."""
    from engine.representation.extractor import Tap

    tap = Tap("tap", shape)
    y = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    features = make_pool(pool)(y)
    assert features.shape == (3, make_pool(pool).num_features(tap))
    g = torch.randn_like(features)
    (expected,) = torch.autograd.grad(features, y, g)
    constant, slope = make_pool(pool).gradient(g, features.detach(), tap)
    found = constant if slope is None else constant + slope * y
    assert relative_error(found.expand_as(y).detach(), expected) <= 1e-12


def test_any_distance_will_do(tiny_extractor, draw_images):
    """The distance of means of all features, which is GFMN's first half without averaging."""
    extractor = in_float64(tiny_extractor)
    mean = extractor.features(draw_images(6)).mean(dim=0)
    images = draw_images(IMAGES).requires_grad_()
    expected = (extractor.features(images).mean(dim=0) - mean).square().sum()
    (gradient,) = torch.autograd.grad(expected, images)
    objective = OnFeatures(extractor, lambda x: (x.mean(dim=0) - mean).square().sum(), pool="none", chunk_size=2)
    loss, found = run_step(objective, images)
    assert relative_error(loss, expected) <= 1e-12
    assert relative_error(found, gradient) <= 1e-12


@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_for_every_chunk(name, tiny_extractor, draw_images):
    """Against autograd through the extractor and the whole matrix of features at once."""
    extractor = in_float64(tiny_extractor)
    real = pooled(extractor, draw_images(12), "mean").detach()
    images = draw_images(8).requires_grad_()
    expected = DISTANCES[name](real)(pooled(extractor, images, "mean"))
    (gradient,) = torch.autograd.grad(expected, images)
    assert float(gradient.abs().max()) > 0
    for chunk in (1, 3, 7, None):
        loss, found = run_step(OnFeatures(extractor, DISTANCES[name](real), chunk_size=chunk), images)
        assert relative_error(loss, expected.detach()) <= 1e-9
        assert relative_error(found, gradient) <= 1e-9


def test_low_precision_is_close(tiny_extractor, draw_images):
    real = pooled(tiny_extractor, draw_images(6, torch.float32), "grid4").detach()
    images = draw_images(IMAGES, torch.float32)
    (full_loss, full), (loss, gradient) = (
        run_step(OnFeatures(tiny_extractor, MMD(real, KERNELS["imq"]), pool="grid4", amp_dtype=dtype), images)
        for dtype in (None, torch.bfloat16)
    )
    assert 1e-5 <= relative_error(gradient, full) <= 0.05
    assert relative_error(loss, full_loss) <= 0.05


def test_without_gradient(tiny_extractor, draw_images):
    extractor = in_float64(tiny_extractor)
    real = pooled(extractor, draw_images(6), "mean")
    images = draw_images(IMAGES)
    objective = OnFeatures(extractor, MMD(real, KERNELS["linear"]), chunk_size=3)
    with torch.no_grad():
        loss = objective(images)
    assert not loss.requires_grad
    assert relative_error(loss, mmd_by_hand("linear", pooled(extractor, images, "mean"), real, False)) <= 1e-10


@pytest.mark.parametrize("pool", POOLS)
def test_pooled_features_are_kept_only_where_gradients_need_them(pool, tiny_extractor, draw_images):
    objective = OnFeatures(tiny_extractor, lambda x: x.square().sum(), pool=pool)
    criterion = FeatureCriterion(objective, IMAGES, differentiable=True)
    objective.feature_pass.collect(draw_images(IMAGES, torch.float32), criterion)
    features = weakref.ref(criterion.features)
    criterion.finish(ALONE)
    assert (features() is not None) == (pool == "mean+std")


def test_unknown_pool(tiny_extractor):
    with pytest.raises(InputError) as error:
        OnFeatures(tiny_extractor, torch.sum, pool="grid0")
    assert error.value.argument == "pool"


class TestBank:
    """Banks of real features: exact, merged in the order of the data set, the same file for the same images."""

    @pytest.fixture
    def dataset(self, draw_images, tmp_path):
        import numpy as np

        pixels = draw_images(11).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        np.save(tmp_path / "images.npy", pixels)
        return open_dataset("images", tmp_path / "images.npy", image_size=8)

    def collected(self, extractor: Extractor, dataset, batch_size: int, at_most: int = 100, **options) -> FeatureBank:
        feature_pass = FeaturePass(extractor)
        collector = BankKind("grid4", at_most).collector(feature_pass, len(dataset))
        for batch in ImageLoader(dataset, batch_size, **options):
            feature_pass.collect(batch.images.to(extractor.dtype), collector)
            collector.end_batch(batch.indices)
        return collector.result({}, [])

    def test_features_are_those_of_the_plain_path(self, tiny_extractor, dataset):
        extractor = in_float64(tiny_extractor)
        (batch,) = ImageLoader(dataset, 11)
        expected = pooled(extractor, batch.images.double(), "grid4")
        for options in ({}, {"shuffle": True, "seed": 3}):
            bank = self.collected(extractor, dataset, 4, **options)
            assert torch.equal(bank.indices, torch.arange(11))
            assert bank.sizes == tuple(sizes(POOLS["grid4"], extractor.taps))
            assert relative_error(bank.features, expected) <= 1e-12

    def test_at_most(self, tiny_extractor, dataset):
        whole, part = (self.collected(tiny_extractor, dataset, 4, at_most) for at_most in (100, 3))
        assert part.indices.tolist() == [0, 3, 7]
        assert torch.equal(part.features, whole.features[part.indices])

    def test_merge_and_file(self, tiny_extractor, dataset, tmp_path):
        whole = self.collected(tiny_extractor, dataset, 11)
        odd, even = (
            FeatureBank(whole.features[start::2], whole.indices[start::2], whole.sizes, {"a": "1"}, ["x: bad"])
            for start in (1, 0)
        )
        merged = odd.merge(even)
        assert torch.equal(merged.features, whole.features)
        merged.save(tmp_path / "bank.safetensors")
        found = FeatureBank.load(tmp_path / "bank.safetensors", {"a": "1"})
        assert torch.equal(found.features, whole.features)
        assert (found.sizes, found.fingerprint, found.skipped) == (whole.sizes, {"a": "1"}, ("x: bad",))
        with pytest.raises(InputError) as error:
            FeatureBank.load(tmp_path / "bank.safetensors", {"a": "2"})
        assert error.value.argument == tmp_path / "bank.safetensors"

    def test_state(self, tiny_extractor, dataset):
        """A pass that is interrupted after its first batch and resumed from the saved state."""
        feature_pass = FeaturePass(tiny_extractor)
        first, second = (BankKind("grid4", 100).collector(feature_pass, 11) for _ in range(2))
        collector = first
        for number, batch in enumerate(ImageLoader(dataset, 4)):
            if number == 1:
                second.restore(first.state())
                collector = second
            feature_pass.collect(batch.images, collector)
            collector.end_batch(batch.indices)
        assert second.count == 11
        assert torch.equal(second.result({}, []).features, self.collected(tiny_extractor, dataset, 4).features)
        with pytest.raises(ValueError, match="other features"):
            BankKind("none", 100).collector(feature_pass, 11).restore(first.state())

    def test_every_tap_counts_the_same(self, tiny_extractor, dataset):
        """Scaled, ‖x − y‖² has the same mean over pairs in every tap: 2, counting pairs of an image with itself."""
        bank = self.collected(in_float64(tiny_extractor), dataset, 11)
        scaled = bank.features * bank.scales()
        for part in scaled.split(bank.sizes, dim=1):
            assert math.isclose(float(torch.cdist(part, part).square().mean()), 2, rel_tol=1e-9)
        dead = FeatureBank(torch.ones(4, 5), torch.arange(4), [2, 3])
        assert dead.scales().tolist() == [0.0] * 5


def test_a_negative_estimate_of_one_network_keeps_its_gradients_direction() -> None:
    """Unbiased MMD² of each half of the features, the first one's below 0, added as their sizes say."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    parts = (slice(0, 4), slice(4, 8))
    distances = [
        MMD(x.detach()[:, parts[0]].flip(0), kernels.gaussian((0.5,)), unbiased=True),  # the very same points
        MMD(torch.full((6, 4), 9.0, dtype=torch.float64), kernels.gaussian((0.5,)), unbiased=True),
    ]
    losses = [distance(x[:, part]) for distance, part in zip(distances, parts, strict=True)]
    assert losses[0] < -0.01
    assert losses[1] > 0.01
    (found,) = torch.autograd.grad(OfNetworks(distances, parts, None)(x), x)
    (first,), (second,) = (torch.autograd.grad(loss, x) for loss in losses)
    expected = first / (-losses[0] + 0.01) + second / (losses[1] + 0.01)
    assert relative_error(found, expected.detach()) < 1e-12
