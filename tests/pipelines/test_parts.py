"""Loaders that share every batch: W parts together are one loader, and any W goes on where another one stopped."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.training.ranks import Ranks
from pipelines import Batch, DataError, ImageLoader, ImageStream, open_dataset
from pipelines.dataset import ImageDataset
from pipelines.loading.loader import rows_of

SIZES = (1, 2, 3, 5)


@pytest.fixture
def dataset(tiles: np.ndarray, tmp_path: Path) -> ImageDataset:
    """97 images; minibatches of 8 leave a last one of 1, of which most parts have nothing."""
    np.save(tmp_path / "tiles.npy", tiles)
    return open_dataset("images", tmp_path / "tiles.npy")


@pytest.fixture
def spoilt(photos: list[np.ndarray], tmp_path: Path) -> ImageDataset:
    """23 small pictures in files, five of which no decoder takes; in order, 8 to 11 are a minibatch of 4."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(23):
        Image.fromarray(photos[n % 3][n : n + 24, 40:64]).save(folder / f"{n:02d}.png")
        if n in (2, 8, 9, 10, 11):
            (folder / f"{n:02d}.png").write_bytes(b"no picture")
    return open_dataset("images", folder, image_size=16, skip_bad_images=True)


def parts_of(dataset: ImageDataset, size: int, batch_size: int, **options: object) -> list[ImageLoader]:
    return [ImageLoader(dataset, batch_size, part=part, num_parts=size, **options) for part in range(size)]


def together(batches: tuple[Batch, ...]) -> Batch:
    """The minibatch whose rows the parts have in turn."""
    return Batch(torch.cat([batch.images for batch in batches]), torch.cat([batch.indices for batch in batches]))


def same(found: list[Batch], expected: list[Batch]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a.indices, b.indices) and torch.equal(a.images, b.images) for a, b in pairs)


def place(stream: ImageStream) -> dict[str, int]:
    return {name: int(value) for name, value in stream.state_dict().items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch_size", [8, 3, 97, 200])
def test_parts_together_are_one_loader(dataset: ImageDataset, backend: str, size: int, batch_size: int) -> None:
    options = {"backend": backend, "shuffle": True, "seed": 3}
    alone, parts = ImageLoader(dataset, batch_size, **options), parts_of(dataset, size, batch_size, **options)
    for _ in range(2):
        expected = list(alone)
        shares = [list(part) for part in parts]
        assert all(len(share) == len(part) == len(alone) for share, part in zip(shares, parts, strict=True))
        assert same([together(batches) for batches in zip(*shares, strict=True)], expected)
        for batch, *own in zip(expected, *shares, strict=True):
            lengths = [len(share.indices) for share in own]
            assert max(lengths) - min(lengths) <= 1
            assert sum(lengths) == len(batch.indices)
    assert sum(part.num_images for part in parts) == 97
    assert [part.position for part in parts] == [alone.position] * size


@pytest.mark.parametrize("size", SIZES)
def test_an_empty_share_is_an_empty_batch(dataset: ImageDataset, backend: str, size: int) -> None:
    shares = [list(part)[-1] for part in parts_of(dataset, size, 8, backend=backend)]
    assert [len(share.images) for share in shares] == [1] + [0] * (size - 1)
    for share in shares:
        assert share.images.shape[1:] == (3, 32, 32)
        assert (share.images.dtype, share.indices.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 5), (5, 2)])
def test_a_pass_goes_on_with_another_number_of_parts(
    dataset: ImageDataset, backend: str, before: int, after: int
) -> None:
    options = {"backend": backend, "shuffle": True, "seed": 1}
    whole = list(ImageLoader(dataset, 8, **options))
    begun = parts_of(dataset, before, 8, **options)
    first = [list(itertools.islice(part, 5)) for part in begun]
    assert {(part.epoch, part.position) for part in begun} == {(1, 5)}
    rest = [list(part.batches(begun[0].position)) for part in parts_of(dataset, after, 8, **options)]
    found = [together(batches) for batches in [*zip(*first, strict=True), *zip(*rest, strict=True)]]
    assert same(found, whole)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_bad_images_leave_the_same_minibatches(spoilt: ImageDataset, backend: str, size: int, shuffle: bool) -> None:
    options = {"backend": backend, "shuffle": shuffle, "seed": 2}
    alone = ImageLoader(spoilt, 4, **options)
    expected = list(alone)
    parts = parts_of(spoilt, size, 4, **options)
    shares = [list(part) for part in parts]
    found = [together(batches) for batches in zip(*shares, strict=True)]
    if size > 1:
        assert len(found) == 6
        found = [batch for batch in found if len(batch.indices)]
    assert len(expected) == (6 if shuffle else 5)
    assert same(found, expected)
    assert {part.position for part in parts} == {alone.position} == {6}
    assert sorted(bad for part in parts for bad in part.bad_images) == alone.bad_images
    assert sorted(index for batch in found for index in batch.indices.tolist()) == [
        n for n in range(23) if n not in (2, 8, 9, 10, 11)
    ]


@pytest.mark.parametrize("size", SIZES)
def test_drop_last_leaves_out_the_short_minibatch(dataset: ImageDataset, backend: str, size: int) -> None:
    options = {"backend": backend, "shuffle": True, "drop_last": True}
    parts = parts_of(dataset, size, 8, **options)
    shares = [list(part) for part in parts]
    assert all(len(share) == len(part) == 12 for share, part in zip(shares, parts, strict=True))
    assert same([together(batches) for batches in zip(*shares, strict=True)], list(ImageLoader(dataset, 8, **options)))
    assert sum(part.num_images for part in parts) == 96
    assert len(ImageLoader(dataset, 97, drop_last=True, backend=backend)) == 1


@pytest.mark.parametrize("size", SIZES)
def test_shards_have_parts_as_well(dataset: ImageDataset, backend: str, size: int) -> None:
    options = {"backend": backend, "shuffle": True, "shard": 1, "num_shards": 4}
    shares = [list(part) for part in parts_of(dataset, size, 7, **options)]
    expected = list(ImageLoader(dataset, 7, **options))
    assert same([together(batches) for batches in zip(*shares, strict=True)], expected)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (3, 3), (64, 7), (2, 5), (0, 2), (1, 1)])
def test_rows_are_those_of_a_rank(count: int, size: int) -> None:
    assert [rows_of(count, part, size) for part in range(size)] == [Ranks(n, size).share(count) for n in range(size)]


@pytest.mark.parametrize("options", [{"part": 2, "num_parts": 2}, {"part": -1}, {"num_parts": 0}], ids=str)
def test_parts_out_of_range_are_one_line(dataset: ImageDataset, options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="part must be from 0"):
        ImageLoader(dataset, 8, **options)


class TestStream:
    def test_is_the_epochs_one_after_the_other(self, dataset: ImageDataset, backend: str) -> None:
        options = {"backend": backend, "shuffle": True, "seed": 4}
        loader = ImageLoader(dataset, 40, **options)
        expected = [batch for _ in range(3) for batch in loader]
        assert same(list(itertools.islice(ImageStream(ImageLoader(dataset, 40, **options)), 9)), expected)

    @pytest.mark.parametrize("drop_last", [False, True])
    @pytest.mark.parametrize("steps", [0, 1, 12, 13, 30])
    def test_goes_on_exactly_with_any_number_of_parts(
        self, dataset: ImageDataset, backend: str, steps: int, drop_last: bool
    ) -> None:
        options = {"backend": backend, "shuffle": True, "seed": 4, "drop_last": drop_last}
        whole = list(itertools.islice(ImageStream(ImageLoader(dataset, 8, **options)), steps + 3))
        begun = [ImageStream(loader) for loader in parts_of(dataset, 3, 8, **options)]
        for stream in begun:
            assert len(list(itertools.islice(stream, steps))) == steps
        epoch, position = divmod(steps, 12 if drop_last else 13)
        assert [place(stream) for stream in begun] == [{"epoch": epoch, "position": position}] * 3
        for size in (1, 2, 5):
            streams = [ImageStream(loader) for loader in parts_of(dataset, size, 8, **options)]
            for stream in streams:
                next(stream)  # what was begun is given up
                stream.load_state_dict(begun[1].state_dict())
            rest = [together(batches) for batches in itertools.islice(zip(*streams, strict=True), 3)]
            assert same(rest, whole[steps:])

    def test_passes_over_minibatches_without_a_good_image(self, spoilt: ImageDataset, backend: str) -> None:
        stream = ImageStream(ImageLoader(spoilt, 4, backend=backend))
        seen = [batch.indices.tolist() for batch in itertools.islice(stream, 7)]
        assert seen[1:3] == [[4, 5, 6, 7], [12, 13, 14, 15]]
        assert seen[5:] == seen[:2]
        assert place(stream) == {"epoch": 1, "position": 2}

    def test_an_epoch_without_a_good_image_ends_it(self, tmp_path: Path, backend: str) -> None:
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "bad.png").write_bytes(b"no picture")
        dataset = open_dataset("images", tmp_path / "pictures", image_size=16, skip_bad_images=True)
        with pytest.raises(DataError, match=r"no image of images can be used: .*bad\.png"):
            next(ImageStream(ImageLoader(dataset, 4, backend=backend)))

    def test_a_batch_larger_than_the_data_set_is_refused(self, dataset: ImageDataset) -> None:
        with pytest.raises(DataError, match="batch_size is 98, and images has 97 images"):
            ImageStream(ImageLoader(dataset, 98, backend="torch", drop_last=True))

    @pytest.mark.parametrize("state", [{"epoch": 0, "position": 13}, {"epoch": -1, "position": 0}], ids=str)
    def test_a_place_that_is_not_there_is_refused(self, dataset: ImageDataset, state: dict[str, int]) -> None:
        with pytest.raises(DataError, match="an epoch has 13 batches"):
            ImageStream(ImageLoader(dataset, 8, backend="torch")).load_state_dict(state)
