"""Landmarks as a kind of reference: what `LandmarkMMD` makes of a bank, once, in a file and in the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import relative_error
from sklearn.cluster import KMeans

from engine.comparison.distances import LandmarkMMD, kernels
from engine.comparison.distances.moments import check_fingerprint
from engine.comparison.reference import cache
from engine.comparison.reference.bank import BankKind, FeatureBank
from engine.comparison.reference.cache import cached_reference
from engine.comparison.reference.landmarks import FeatureLandmarks, LandmarksKind
from engine.configuration.config import Config
from engine.configuration.objectives import blank_reference, make_objective, reference_kind
from engine.representation.build import build_extractor
from engine.support.errors import InputError

KERNEL = kernels.gaussian((0.5, 1.0))
KIND = LandmarksKind(BankKind("mean", 100), 4, KERNEL, (slice(0, 3), slice(3, 8)), seed=3)


@pytest.fixture
def bank() -> FeatureBank:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(23, 8, generator=generator) * torch.tensor([1.0] * 3 + [50.0] * 5)
    return FeatureBank(features, torch.arange(23), [3, 5], {"a": "1"}, ["x: bad"])


def test_every_part_has_its_own(bank: FeatureBank) -> None:
    """Points by scikit-learn; the weights solve the equations of `LandmarkMMD`, written out in float64."""
    found = KIND.finished(bank)
    assert (found.count, found.fingerprint, found.skipped) == (23, {"a": "1"}, ("x: bad",))
    for place, part in enumerate(KIND.parts):
        scaled = bank.features[:, part] * found.scales[part]
        assert float(torch.pdist(scaled.double()).quantile(0.5)) == pytest.approx(1, rel=1e-5)
        means = KMeans(4, n_init=1, max_iter=20, random_state=3).fit(scaled.numpy()).cluster_centers_
        assert torch.equal(found.points[place], torch.from_numpy(means))
        points = found.points[place].double()

        def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            squares = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
            return torch.exp(-squares / (2 * 0.5**2)) + torch.exp(-squares / 2)

        inner = kernel(points, points)
        towards = kernel(points, scaled.double()).mean(dim=1)
        weights = torch.linalg.solve(inner + 1e-6 * 2 * torch.eye(4).double(), towards)
        assert relative_error(found.weights[place], weights) <= 1e-8


def test_file(bank: FeatureBank, tmp_path: Path) -> None:
    found, file = KIND.finished(bank), tmp_path / "landmarks.safetensors"
    found.save(file)
    again = KIND.load(file, {"a": "1"})
    assert (again.count, again.fingerprint, again.skipped) == (23, {"a": "1"}, ("x: bad",))
    for one, other in zip((*found.points, *found.weights), (*again.points, *again.weights), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found.scales, again.scales)
    assert 0 < found.nbytes <= file.stat().st_size
    with pytest.raises(InputError) as error:
        KIND.load(file, {"a": "2"})
    assert error.value.argument == file
    bank.save(file)
    with pytest.raises(InputError, match="is not a file of landmarks"):
        FeatureLandmarks.load(file)


@pytest.mark.parametrize(
    "change",
    [{"landmarks": 5}, {"seed": 4}, {"kernel": kernels.gaussian((0.5,))}, {"bank": BankKind("mean", 99)}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_them_is_in_the_fingerprint(change: dict) -> None:
    assert replace(KIND, **change).entries != KIND.entries
    assert KIND.entries != KIND.bank.entries


def test_runs_that_kept_a_bank_can_be_resumed() -> None:
    """Their checkpoints know nothing of landmarks, and what they know is as it was."""
    check_fingerprint(KIND.entries, KIND.bank.entries, "a checkpoint")
    with pytest.raises(InputError, match="kernel"):
        check_fingerprint(KIND.entries, replace(KIND, kernel=kernels.energy()).entries, "a checkpoint")


def test_more_landmarks_than_images(bank: FeatureBank) -> None:
    with pytest.raises(InputError, match="number of images, 23") as error:
        replace(KIND, landmarks=24).finished(bank)
    assert error.value.argument == "landmarks"


def test_images_that_are_all_the_same() -> None:
    same = FeatureBank(torch.ones(5, 8), torch.arange(5), [3, 5])
    with pytest.raises(InputError, match="real images that differ") as error:
        KIND.finished(same)
    assert error.value.argument == "data"


@pytest.mark.parametrize("kernel", ["rational-quadratic", "energy"])
def test_a_step_compares_with_them(kernel: str, tmp_path: Path, own_cache, draw_images, monkeypatch) -> None:
    """From the cache, with the loss of `LandmarkMMD` on the plain path's features; shapes as a plan takes them."""
    given = {"method": "mmd", "mmd_landmarks": 6, "mmd_kernel": kernel, "pool": "mean", "image_size": 8, "layers": 2}
    config = Config.build("digits", {**given, "weights": ("random",), "kernels": "reference"})
    extractor, images = build_extractor("vgg-small", image_size=8, layers=2), draw_images(5, torch.float32)
    loader = _loader(tmp_path, draw_images(30))
    kind = reference_kind(config, extractor)
    known = cached_reference(kind, extractor, loader, kernels="reference")
    monkeypatch.delattr(cache, "compute_reference")  # now it has to be found
    again = cached_reference(kind, extractor, loader, kernels="reference")
    assert torch.equal(again.points[0], known.points[0])
    blank = blank_reference(config, extractor)
    assert [part.shape for part in (*blank.points, *blank.weights)] == [
        part.shape for part in (*known.points, *known.weights)
    ]

    def features(x: torch.Tensor) -> torch.Tensor:
        maps = extractor.features(x).split([tap.num_features for tap in extractor.taps], dim=1)
        return torch.cat([part.unflatten(1, tap.shape).mean(dim=(2, 3)) for part, tap in zip(maps, extractor.taps)], 1)

    real = torch.cat([features(batch.images) for batch in loader])
    distance = LandmarkMMD(real * known.scales, kind.kernel, 6, seed=config.training.seed)
    expected = distance(features(images) * known.scales)
    with torch.no_grad():
        found = make_objective(config, extractor, known, None)(images)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def _loader(folder: Path, images: torch.Tensor):
    import numpy as np

    from pipelines import ImageLoader, open_dataset

    pixels = images.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.save(folder / "images.npy", pixels)
    return ImageLoader(open_dataset("images", folder / "images.npy", image_size=8), 7, backend="torch")
