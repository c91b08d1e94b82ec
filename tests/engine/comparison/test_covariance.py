"""Covariances of real features: against `torch.cov`, whatever the batches, shards and interruptions."""

from __future__ import annotations

import pytest
import torch
from oracle import in_float64, relative_error

from engine.comparison.pooling import make_pool
from engine.comparison.reference.bank import FeatureBank
from engine.comparison.reference.covariance import CovarianceCollector, CovarianceKind, FeatureCovariance
from engine.representation.feature_pass import FeaturePass
from engine.support.errors import InputError

IMAGES = 29


@pytest.fixture
def feature_pass(tiny_extractor):
    return FeaturePass(in_float64(tiny_extractor))


def collected(feature_pass: FeaturePass, images: torch.Tensor, batch: int, resumed: bool = False) -> FeatureCovariance:
    collector = CovarianceCollector(feature_pass.prepared, "mean")
    for start in range(0, len(images), batch):
        if resumed:
            state, collector = collector.state(), CovarianceCollector(feature_pass.prepared, "mean")
            collector.restore(state)
        part = images[start : start + batch]
        feature_pass.collect(part.clone(), collector)
        collector.end_batch(torch.arange(start, start + len(part)))
    return collector.result({"of": "a test"}, ())


def features(feature_pass: FeaturePass, images: torch.Tensor) -> torch.Tensor:
    """Pooled, by the plain path."""
    extractor = feature_pass.extractor
    parts = extractor.features(images).split([tap.num_features for tap in extractor.taps], dim=1)
    pool = make_pool("mean")
    return torch.cat(
        [pool(part.unflatten(1, tap.shape)) for part, tap in zip(parts, extractor.taps, strict=True)], dim=1
    )


@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
@pytest.mark.parametrize("batch", [1, 4, IMAGES])
def test_is_torch_s(feature_pass, draw_images, batch, resumed):
    images = draw_images(IMAGES).double() + 3
    x = features(feature_pass, images)
    found = collected(feature_pass, images, batch, resumed)
    assert found.count == IMAGES
    assert relative_error(found.mean, x.mean(dim=0)) <= 1e-12
    assert relative_error(found.covariance(), torch.cov(x.T)) <= 1e-12
    assert relative_error(found.scales(), FeatureBank(x, torch.arange(IMAGES), found.sizes).scales()) <= 1e-12


def test_shards_merge(feature_pass, draw_images):
    images = draw_images(IMAGES).double()
    whole = collected(feature_pass, images, 5)
    parts = [collected(feature_pass, part, 3) for part in images.split([4, 20, 5])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.count == whole.count
    assert relative_error(merged.covariance(), whole.covariance()) <= 1e-12


def test_file(feature_pass, draw_images, tmp_path):
    file = tmp_path / "real.safetensors"
    whole = collected(feature_pass, draw_images(IMAGES).double(), 5)
    whole.save(file)
    found = CovarianceKind("mean").load(file, {"of": "a test"})
    assert isinstance(found, FeatureCovariance)
    assert torch.equal(found.m2, whole.m2)
    with pytest.raises(InputError, match="made from something else"):
        CovarianceKind("mean").load(file, {"of": "another"})
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError) as error:
        CovarianceKind("mean").load(file)
    assert error.value.argument == file


def test_few_images_are_kept_themselves(feature_pass, draw_images, tmp_path):
    """Their covariance has no higher rank than they are."""
    kind = CovarianceKind("mean")
    collector = kind.collector(feature_pass, 5)
    images = draw_images(5).double()
    feature_pass.collect(images.clone(), collector)
    collector.end_batch(torch.arange(5))
    bank = collector.result({}, ())
    assert isinstance(bank, FeatureBank)
    assert relative_error(bank.features, features(feature_pass, images)) <= 1e-12
    bank.save(tmp_path / "bank.safetensors")
    assert isinstance(kind.load(tmp_path / "bank.safetensors"), FeatureBank)


def test_too_many_features(feature_pass, monkeypatch):
    monkeypatch.setattr("engine.comparison.reference.covariance.MOST_FEATURES", 10)
    with pytest.raises(InputError) as error:
        CovarianceKind("grid4").collector(feature_pass, 1_000_000)
    assert error.value.argument == "pool"


def test_one_image_has_no_covariance(feature_pass, draw_images):
    with pytest.raises(InputError, match="at least 2"):
        collected(feature_pass, draw_images(1).double(), 1).covariance()
