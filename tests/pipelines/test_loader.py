"""Both backends over arrays in memory: values, order, shards, and every image exactly once."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines.loading.loader
from pipelines import DataError, ImageLoader, open_dataset
from pipelines.dataset import ImageDataset


@pytest.fixture
def dataset(tiles: np.ndarray, tmp_path: Path) -> ImageDataset:
    np.save(tmp_path / "tiles.npy", tiles)
    return open_dataset("images", tmp_path / "tiles.npy")


@pytest.fixture
def flipped(tiles: np.ndarray, tmp_path: Path) -> ImageDataset:
    np.save(tmp_path / "tiles.npy", tiles)
    return open_dataset("images", tmp_path / "tiles.npy", horizontal_flip=True)


def expected(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] → what a loader must give, computed in float64."""
    return torch.from_numpy(images.astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1).float()


def indices_of(loader: ImageLoader) -> list[list[int]]:
    return [batch.indices.tolist() for batch in loader]


@pytest.mark.parametrize("batch_size", [1, 13, 64, 97, 200])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_every_image_once_and_right(
    flipped: ImageDataset, tiles: np.ndarray, backend: str, batch_size: int, shuffle: bool
) -> None:
    both = np.concatenate([tiles, tiles[:, :, ::-1]])
    loader = ImageLoader(flipped, batch_size, backend=backend, shuffle=shuffle, seed=3)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-194 // batch_size)
    seen = torch.cat([batch.indices for batch in batches])
    assert seen.dtype == torch.int64
    assert sorted(seen.tolist()) == list(range(194))
    assert (seen.tolist() == list(range(194))) != shuffle
    for batch in batches:
        assert batch.images.dtype == torch.float32
        assert batch.images.shape == (len(batch.indices), 3, 32, 32)
        assert batch.images.is_contiguous()
        torch.testing.assert_close(batch.images, expected(both[batch.indices.numpy()]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [3, 2, 1, 0], [0, 0, 3, 3], [96, 0, 1], [5]], ids=str)
def test_any_order_of_indices_is_kept(dataset: ImageDataset, tiles: np.ndarray, backend: str, order: list[int]) -> None:
    loader = importlib.import_module(f"pipelines.loading.{backend}_loader")
    ((images, indices),) = loader.run(dataset, [np.array(order)], torch.device("cpu"), None, {})
    assert indices.tolist() == order
    torch.testing.assert_close(images, expected(tiles[order]), rtol=0, atol=1e-6)


def test_the_two_backends_give_the_same_bits(flipped: ImageDataset) -> None:
    pytest.importorskip("nvidia.dali")
    loaders = [ImageLoader(flipped, 10, backend=name, shuffle=True) for name in ("dali", "torch")]
    for dali, plain in zip(*loaders, strict=True):
        assert torch.equal(dali.images, plain.images)
        assert torch.equal(dali.indices, plain.indices)


def test_all_256_values_reach_the_ends_exactly(backend: str, tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    np.save(tmp_path / "ramp.npy", ramp)
    (batch,) = ImageLoader(open_dataset("images", tmp_path / "ramp.npy", image_size=16), 4, backend=backend)
    values = batch.images[0, 0].flatten()
    assert values[0] == -1
    assert values[255] == 1
    assert (values.diff() > 0).all()


def test_earlier_batches_stay_valid(dataset: ImageDataset, tiles: np.ndarray, backend: str) -> None:
    batches = [batch for _ in range(3) for batch in ImageLoader(dataset, 8, backend=backend)]
    for batch in batches:
        torch.testing.assert_close(batch.images, expected(tiles[batch.indices.numpy()]), rtol=0, atol=1e-6)
        batch.images.zero_()
    assert np.array_equal(dataset.images, tiles), "writing to a batch must not reach the dataset"


@pytest.mark.parametrize(("count", "shards", "batch_size"), [(26, 4, 6), (97, 3, 7), (5, 7, 2), (194, 13, 1)])
def test_shards_share_the_images_and_never_yield_an_empty_batch(
    flipped: ImageDataset, backend: str, count: int, shards: int, batch_size: int, tmp_path: Path
) -> None:
    np.save(tmp_path / "some.npy", np.concatenate([flipped.images] * 2)[:count])
    dataset = open_dataset("images", tmp_path / "some.npy")
    seen: list[int] = []
    for shard in range(shards):
        loader = ImageLoader(dataset, batch_size, backend=backend, shuffle=True, seed=1, shard=shard, num_shards=shards)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch.indices) for batch in batches)
        assert all(len(batch.images) == len(batch.indices) for batch in batches)
        seen += [index for batch in batches for index in batch.indices.tolist()]
    assert sorted(seen) == list(range(count))


def test_the_order_depends_on_seed_and_epoch_only(dataset: ImageDataset, backend: str) -> None:
    loader = ImageLoader(dataset, 10, backend=backend, shuffle=True, seed=5)
    first, second = indices_of(loader), indices_of(loader)
    assert first != second
    again = ImageLoader(dataset, 10, backend="torch", shuffle=True, seed=5)
    again.epoch = 1
    assert indices_of(again) == second
    again.epoch = 0
    assert indices_of(again) == first
    assert indices_of(ImageLoader(dataset, 10, backend=backend, shuffle=True, seed=6)) != first
    coarse = ImageLoader(dataset, 97, backend=backend, shuffle=True, seed=5)
    assert indices_of(coarse)[0] == [index for batch in first for index in batch], (
        "the batch size does not change the order"
    )


def test_an_abandoned_epoch_changes_nothing(dataset: ImageDataset, backend: str) -> None:
    loader = ImageLoader(dataset, 10, backend=backend, shuffle=True, seed=5)
    for _ in loader:
        break
    fresh = ImageLoader(dataset, 10, backend=backend, shuffle=True, seed=5)
    fresh.epoch = 1
    assert indices_of(loader) == indices_of(fresh)


def test_a_pass_continues_from_any_batch(dataset: ImageDataset, backend: str) -> None:
    whole = list(ImageLoader(dataset, 10, backend=backend, shuffle=True, seed=5))
    rest = list(ImageLoader(dataset, 10, backend=backend, shuffle=True, seed=5).batches(first=6))
    assert len(rest) == len(whole) - 6
    for late, early in zip(rest, whole[6:], strict=True):
        assert torch.equal(late.images, early.images)
        assert torch.equal(late.indices, early.indices)


def test_auto_takes_dali(dataset: ImageDataset, photo_files: Path) -> None:
    pytest.importorskip("nvidia.dali")
    assert ImageLoader(open_dataset("images", photo_files), 4).backend == "dali"
    assert ImageLoader(dataset, 4).backend == "dali"
    assert ImageLoader(dataset, 4, backend="torch").backend == "torch"


def test_without_dali_auto_says_one_line_and_works(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    pipelines.loading.loader._say_torch_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="gfmn"):
        loaders = [ImageLoader(dataset, 40), ImageLoader(dataset, 40)]
    assert [loader.backend for loader in loaders] == ["torch", "torch"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name == "gfmn"
    assert "DALI" in record.message
    assert sum(len(batch.indices) for batch in loaders[0]) == 97
    with pytest.raises(DataError, match="not installed"):
        ImageLoader(dataset, 40, backend="dali")


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 4, "backend": "tensorflow"},
        {"batch_size": 4, "shard": 2, "num_shards": 2},
        {"batch_size": 4, "seed": -1},
        {"batch_size": 4, "device": "cuda"},
    ],
    ids=str,
)
def test_bad_arguments_are_one_line(dataset: ImageDataset, arguments: dict[str, object]) -> None:
    with pytest.raises(DataError) as error:
        ImageLoader(dataset, **arguments)
    assert "\n" not in str(error.value)
