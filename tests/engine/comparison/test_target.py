"""The target pass: exact, the same bits after an interruption, cached by everything that decides it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.comparison.distances.moments import Moments
from engine.comparison.reference import cache, statistics_pass
from engine.comparison.reference.target import MomentsKind
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.protocols import TapInput
from engine.support.errors import InputError
from pipelines import DataError, ImageDataset, ImageLoader, open_dataset

COUNT = 61
KIND = MomentsKind()
# The plain kernels, unless a test says otherwise.
compute_target = functools.partial(statistics_pass.compute_reference, KIND, kernels="reference")


def cached_target(
    extractor: Extractor, dataset: ImageDataset, *, amp_dtype: torch.dtype | None = None, **options: Any
) -> Moments:
    images = statistics_pass.reference_loader(extractor, dataset, **{"batch_size": 64, "seed": 0, **options})
    return cache.cached_reference(KIND, extractor, images, amp_dtype=amp_dtype)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pieces() -> np.ndarray:
    """Pieces of two photographs, uint8 [61, 8, 8, 3]."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    return np.stack([photos[n % 2][6 * n : 6 * n + 8, 9 * n : 9 * n + 8] for n in range(COUNT)])


@pytest.fixture
def dataset(pieces: np.ndarray, tmp_path: Path) -> ImageDataset:
    np.save(tmp_path / "pieces.npy", pieces)
    return open_dataset("images", tmp_path / "pieces.npy", image_size=8)


@pytest.fixture
def folder(pieces: np.ndarray, tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n, piece in enumerate(pieces[:12]):
        Image.fromarray(piece).save(folder / f"{n:02d}.png")
    return folder


class Recorder:
    """Applies the activations and keeps all features as they are, per tap."""

    def __init__(self, extractor: Extractor):
        self.taps: list[list[Tensor]] = [[] for _ in extractor.taps]

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        self.taps[tap].append(x.activate_().flatten(1).clone())


def two_pass(extractor: Extractor, batches: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all features by the book, in NumPy's float64."""
    recorder = Recorder(extractor)
    for batch in batches:
        FeaturePass(extractor).collect(batch, recorder)
    features = torch.cat([torch.cat(parts) for parts in recorder.taps], dim=1).numpy().astype(np.float64)
    mean = features.sum(axis=0) / len(features)
    return mean, ((features - mean) ** 2).sum(axis=0) / (len(features) - 1)


def assert_agrees(target: Moments, mean: np.ndarray, variance: np.ndarray, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(target.mean.numpy(), mean, rtol=rtol, atol=0)
    # A feature that is the same for all images has a variance of rounding errors only.
    np.testing.assert_allclose(target.variance().numpy(), variance, rtol=rtol, atol=1e-12)


def same_bits(one: Moments, other: Moments) -> bool:
    same = torch.equal(one.mean, other.mean) and torch.equal(one.m2, other.m2)
    return same and (one.count, one.skipped, one.fingerprint) == (other.count, other.skipped, other.fingerprint)


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
@pytest.mark.parametrize("batch_size", [1, 7, 60, 61, 200])
def test_agrees_with_two_passes_in_float64(tiny_extractor, dataset, kernels: str, batch_size: int) -> None:
    target = compute_target(tiny_extractor, ImageLoader(dataset, batch_size), kernels=kernels)
    assert target.count == COUNT
    assert_agrees(target, *two_pass(tiny_extractor, [batch.images for batch in ImageLoader(dataset, batch_size)]))


def test_batch_statistics_are_of_shuffled_minibatches(dataset) -> None:
    """As in training, so that a target of sorted images is not of minibatches of one class; the seed decides which."""
    torch.manual_seed(0)
    extractor = build_extractor("resnet18", image_size=8, bn="batch", layers=3).double()

    def target(seed: int) -> Moments:
        return compute_target(extractor, statistics_pass.reference_loader(extractor, dataset, batch_size=13, seed=seed))

    shuffled = ImageLoader(dataset, 13, shuffle=True, seed=5)
    found = target(5)
    assert_agrees(found, *two_pass(extractor, [batch.images.double() for batch in shuffled]), rtol=1e-10)
    assert same_bits(found, target(5))
    assert not torch.allclose(found.mean, target(6).mean, rtol=1e-4)


def test_neither_batch_size_nor_order_nor_shards_matter(tiny_extractor, dataset) -> None:
    """With features in float64, so that nothing but the accumulation differs."""
    extractor = copy.deepcopy(tiny_extractor).double()
    mean, variance = two_pass(extractor, [batch.images.double() for batch in ImageLoader(dataset, COUNT)])
    for batch_size in (1, 13, COUNT):
        assert_agrees(compute_target(extractor, ImageLoader(dataset, batch_size)), mean, variance, rtol=1e-12)
    shuffled = ImageLoader(dataset, 13, shuffle=True, seed=3)
    assert_agrees(compute_target(extractor, shuffled), mean, variance, rtol=1e-12)
    for shards in (2, 7):
        parts = [
            compute_target(extractor, part)
            for shard in range(shards)
            if len(part := ImageLoader(dataset, 13, shard=shard, num_shards=shards))
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total.merge(part)
        assert total.count == COUNT
        assert_agrees(total, mean, variance, rtol=1e-12)


class Killed(Exception):
    pass


def interrupted_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """The next pass saves its state after every batch, and dies after some."""
    collect, seen = FeaturePass.collect, []

    def counted(self: FeaturePass, *arguments) -> None:
        if len(seen) == batches:
            raise Killed
        seen.append(arguments)
        collect(self, *arguments)

    monkeypatch.setattr(FeaturePass, "collect", counted)
    monkeypatch.setattr(statistics_pass, "SAVE_EVERY", 0)


@pytest.mark.parametrize("batches", [0, 1, 5, 8])
def test_interrupted_gives_the_same_bits(tiny_extractor, dataset, batches: int, tmp_path, monkeypatch) -> None:
    whole = compute_target(tiny_extractor, ImageLoader(dataset, 7))
    partial = tmp_path / "state.partial"
    with monkeypatch.context() as patch:
        interrupted_after(patch, batches)
        with pytest.raises(Killed):
            compute_target(tiny_extractor, ImageLoader(dataset, 7), partial=partial)
    assert partial.exists() == (batches > 0)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 9 - batches)  # no batch is computed twice
        assert same_bits(compute_target(tiny_extractor, ImageLoader(dataset, 7), partial=partial), whole)


def test_bad_images_before_and_after_an_interruption(tiny_extractor, folder: Path, tmp_path, monkeypatch) -> None:
    """Two whole batches without a good image, and mirrored images, which meet each bad file twice."""
    for n in (0, 2, 3, 10):
        (folder / f"{n:02d}.png").write_text("not an image")
    data = open_dataset("images", folder, image_size=8, horizontal_flip=True, skip_bad_images=True)
    whole = compute_target(tiny_extractor, ImageLoader(data, 2))
    assert whole.count == 16
    assert [Path(line.split(": ")[0]).name for line in whole.skipped] == ["00.png", "02.png", "03.png", "10.png"]
    for batches in (1, 3, 8):
        partial = tmp_path / f"{batches}.partial"
        with monkeypatch.context() as patch:
            interrupted_after(patch, batches)
            with pytest.raises(Killed):
                compute_target(tiny_extractor, ImageLoader(data, 2), partial=partial)
        assert same_bits(compute_target(tiny_extractor, ImageLoader(data, 2), partial=partial), whole)
    whole.save(tmp_path / "target.safetensors")
    cache.write_bad_images(tmp_path / "bad_images.txt", Moments.load(tmp_path / "target.safetensors"))
    assert (tmp_path / "bad_images.txt").read_text().splitlines() == list(whole.skipped)


def test_only_bad_images_is_an_error(tiny_extractor, folder: Path) -> None:
    for path in folder.iterdir():
        path.write_text("not an image")
    data = open_dataset("images", folder, image_size=8, skip_bad_images=True)
    with pytest.raises(InputError, match=r"00\.png"):
        compute_target(tiny_extractor, ImageLoader(data, 5))


@pytest.mark.parametrize("what", ["batch size", "precision", "damaged", "empty"])
def test_state_of_something_else_is_replaced(tiny_extractor, dataset, what: str, tmp_path, monkeypatch) -> None:
    partial = tmp_path / "state.partial"
    with monkeypatch.context() as patch:
        interrupted_after(patch, 4)
        with pytest.raises(Killed):
            compute_target(tiny_extractor, ImageLoader(dataset, 7), partial=partial)
    batch_size, dtype = 7, None
    if what == "batch size":
        batch_size = 5
    elif what == "precision":
        dtype = torch.bfloat16
    else:
        partial.write_bytes(partial.read_bytes()[:1000] if what == "damaged" else b"")
    expected = compute_target(tiny_extractor, ImageLoader(dataset, batch_size), amp_dtype=dtype)
    again = compute_target(tiny_extractor, ImageLoader(dataset, batch_size), amp_dtype=dtype, partial=partial)
    assert same_bits(again, expected)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at every target that is really computed."""
    compute, made = statistics_pass.compute_reference, []

    def counted(*arguments, **options) -> Moments:
        made.append(len(made))
        return compute(*arguments, **{**options, "kernels": "reference"})

    monkeypatch.setattr(cache, "compute_reference", counted)
    return made


CHANGES = ("nothing", "content", "name", "crop", "flip", "weights", "precision", "decoder")


@pytest.mark.parametrize("change", CHANGES)
def test_cache_never_twice_and_never_stale(tiny_extractor, folder: Path, change: str, passes, own_cache) -> None:
    extractor, options, arguments = copy.deepcopy(tiny_extractor), {}, {"loader": "torch"}

    def target() -> Moments:
        return cached_target(extractor, open_dataset("images", folder, image_size=8, **options), **arguments)

    extractor.fingerprint = {"extractor_weights": "one"}
    first = target()
    assert same_bits(target(), first)
    assert len(passes) == 1
    if change == "content":
        pixels = np.asarray(Image.open(folder / "03.png")).copy()
        pixels[0, 0, 0] ^= 1
        Image.fromarray(pixels).save(folder / "03.png")
    elif change == "name":
        (folder / "03.png").rename(folder / "99.png")
    elif change == "crop":
        options["center_crop"] = 6
    elif change == "flip":
        options["horizontal_flip"] = True
    elif change == "weights":
        extractor.fingerprint = {"extractor_weights": "another"}
    elif change == "precision":
        arguments["amp_dtype"] = torch.bfloat16
    elif change == "decoder":
        pytest.importorskip("nvidia.dali")
        arguments["loader"] = "dali"
    second = target()
    assert len(passes) == (1 if change == "nothing" else 2)
    assert len(list((own_cache / "targets").iterdir())) == len(passes)
    fresh = open_dataset("images", folder, image_size=8, **options)
    images = ImageLoader(fresh, 64, backend=arguments["loader"])
    assert same_bits(compute_target(extractor, images, amp_dtype=arguments.get("amp_dtype")), second)


def test_damaged_cache_is_computed_again(tiny_extractor, dataset, passes, own_cache) -> None:
    first = cached_target(tiny_extractor, dataset)
    (path,) = (own_cache / "targets").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    assert same_bits(cached_target(tiny_extractor, dataset), first)
    assert len(passes) == 2
    assert same_bits(Moments.load(path), first)


def test_dataset_that_changes_during_the_pass(tiny_extractor, folder: Path, monkeypatch, own_cache) -> None:
    collect = FeaturePass.collect

    def changing(self: FeaturePass, *arguments) -> None:
        (folder / "00.png").write_bytes((folder / "01.png").read_bytes())
        collect(self, *arguments)

    monkeypatch.setattr(FeaturePass, "collect", changing)
    with pytest.raises(DataError, match="changed while it was read"):
        cached_target(tiny_extractor, open_dataset("images", folder, image_size=8), batch_size=4)
    assert not list((own_cache / "targets").glob("*.safetensors"))
