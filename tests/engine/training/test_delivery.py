"""Real minibatches: the loader's own, shared by ranks, of one shape whatever is bad, and resumed where they stopped."""

from __future__ import annotations

import itertools
import logging
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.recorded_graphs import RecordedImageLane, RecordedLane
from PIL import Image
from torch import Tensor

from engine.support.errors import InputError
from engine.training.delivery import Delivery
from pipelines import Batch, DataError, ImageDataset, ImageLoader, open_dataset
from pipelines.dataset import ArrayDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.loading.loader import dali_is_importable

pytestmark = pytest.mark.usefixtures("own_cache")

SIZE, BATCH, SEED = 8, 5, 3
BAD = (1, 4, 8, 9, 10, 11, 17)


@pytest.fixture(params=["torch", "dali"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "dali" and not dali_is_importable():
        pytest.skip("NVIDIA DALI is not installed")
    return request.param


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """23 of them, a prime number: an epoch has 4 minibatches, and 3 images left."""
    return np.random.default_rng(0).integers(0, 256, (23, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def arrays(pictures: np.ndarray) -> ImageDataset:
    return ArrayDataset("arrays", Preprocessing(image_size=SIZE), pictures)


@pytest.fixture(scope="module")
def files(pictures: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in files, of which `BAD` are no pictures."""
    folder = tmp_path_factory.mktemp("files") / "pictures"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:02d}.png")
    for number in BAD:
        (folder / f"{number:02d}.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def spoilt(own_cache: None, files: Path) -> ImageDataset:
    return open_dataset("images", files, image_size=SIZE, skip_bad_images=True)


def loader(dataset: ImageDataset, backend: str, part: int = 0, parts: int = 1, **options) -> ImageLoader:
    options = {"shuffle": True, "seed": SEED, "drop_last": True, "workers": 0 if backend == "torch" else 1, **options}
    return ImageLoader(
        dataset, options.pop("batch_size", BATCH), backend=backend, part=part, num_parts=parts, **options
    )


def on_ranks(dataset: ImageDataset, backend: str, size: int, state: dict | None = None) -> list[Delivery]:
    deliveries = [Delivery(loader(dataset, backend, rank, size)) for rank in range(size)]
    for delivery in deliveries if state is not None else ():
        delivery.load_state_dict(state)
    return deliveries


def take(delivery: Delivery, count: int) -> list[Batch]:
    """What a step that takes so many minibatches finds; copied, as a later step may find others there."""
    delivery.deliver()
    delivery.begin()
    found = [Batch(*map(Tensor.clone, next(delivery.batches))) for _ in range(count)]
    delivery.end()
    return found


def order(size: int, epochs: int = 3) -> list[list[int]]:
    """The minibatches' images, written out."""
    permutations = (np.random.default_rng([SEED, epoch]).permutation(size) for epoch in range(epochs))
    return [list(p[start : start + BATCH]) for p in permutations for start in range(0, size - BATCH + 1, BATCH)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_image_once_an_epoch_over_all_ranks(
    arrays: ImageDataset, pictures: np.ndarray, backend: str, ranks: int
) -> None:
    deliveries = on_ranks(arrays, backend, ranks)
    found = []
    for _ in range(12):
        shares = [take(delivery, 1)[0] for delivery in deliveries]
        assert [len(share.images) for share in shares] == [delivery.count for delivery in deliveries]
        found.append(torch.cat([share.indices for share in shares]).tolist())
        images = torch.cat([share.images for share in shares]).permute(0, 2, 3, 1)
        assert torch.allclose(images, torch.from_numpy(pictures[found[-1]]) / 127.5 - 1, atol=1e-6)
    assert found == order(23)
    assert all(len({*itertools.chain(*found[4 * n : 4 * n + 4])}) == 20 for n in range(3))


def test_two_then_one_then_three_ranks_see_the_images_in_one_order(arrays: ImageDataset, backend: str) -> None:
    found, state = [], None
    for ranks, steps in ((2, 3), (1, 2), (3, 4)):  # a step takes two minibatches
        deliveries = on_ranks(arrays, backend, ranks, state)
        for _ in range(steps):
            shares = [take(delivery, 2) for delivery in deliveries]
            found += [torch.cat([batch.indices for batch in batches]).tolist() for batches in zip(*shares)]
        places = [delivery.state_dict() for delivery in deliveries]
        assert all(place == places[0] for place in places)
        state = places[0]
    assert found == order(23, 5)[:18]


@pytest.mark.parametrize("stop", range(9))
@pytest.mark.parametrize("part", [0, 1])
def test_resumed_anywhere_with_bad_images(spoilt: ImageDataset, part: int, stop: int) -> None:
    """Shares of bad images alone among them, before and after the place."""
    whole = Delivery(loader(spoilt, "torch", part, 2))
    expected = [take(whole, 1)[0] for _ in range(12)]
    begun, resumed = (Delivery(loader(spoilt, "torch", part, 2)) for _ in range(2))
    for _ in range(stop):
        take(begun, 1)
    resumed.load_state_dict(begun.state_dict())
    for batch in expected[stop:]:
        found = take(resumed, 1)[0]
        assert torch.equal(found.images, batch.images)
        assert torch.equal(found.indices, batch.indices)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_good_images_take_the_places_of_bad_ones(spoilt: ImageDataset, backend: str, ranks: int, caplog) -> None:
    """In turn, and a share of bad ones alone has the next share's: written out, for every rank."""
    caplog.set_level(logging.WARNING)
    alone = 0
    for rank, delivery in enumerate(on_ranks(spoilt, backend, ranks)):
        mine = np.array_split(np.arange(BATCH), ranks)[rank].tolist()
        good = [[batch[row] for row in mine if batch[row] not in BAD] for batch in order(23, 4)]
        if ranks == 1:
            good = [share for share in good if share]  # which one process passes over
        alone += sum(not share for share in good)
        for number in range(10):
            share = next(later for later in good[number:] if later)
            (batch,) = take(delivery, 1)
            assert batch.indices.tolist() == [share[row % len(share)] for row in range(len(mine))]
            assert batch.images.shape == (len(mine), 3, SIZE, SIZE)
            first = batch.indices.tolist().index(batch.indices[-1])
            assert torch.equal(batch.images[first], batch.images[-1])
    assert (alone > 0) == (ranks > 1)
    assert [record.message[:36] for record in caplog.records] == ["warning: minibatches have bad images"] * ranks


def test_bad_images_stop_a_run_that_skips_none(files: Path, backend: str) -> None:
    dataset = open_dataset("images", files, image_size=SIZE)
    delivery = Delivery(loader(dataset, backend))
    with pytest.raises(DataError, match=r"\.png: .*; replace or remove it, or skip bad images"):
        [take(delivery, 1) for _ in range(4)]


def test_nothing_but_bad_images_is_one_line(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    dataset = open_dataset("images", tmp_path, image_size=SIZE, skip_bad_images=True)
    for delivery in (Delivery(loader(dataset, "torch", rank, 2, batch_size=2)) for rank in range(2)):
        with pytest.raises(DataError, match=r"no image of images can be used: .*\.png"):
            take(delivery, 1)


def test_fewer_images_than_a_minibatch_are_refused(arrays: ImageDataset) -> None:
    with pytest.raises(InputError, match="24 is more than the 23 images of arrays; give at most 23") as error:
        Delivery(loader(arrays, "torch", batch_size=24))
    assert error.value.argument == "batch_size"
    assert Delivery(loader(arrays, "torch", batch_size=23)).count == 23


def test_what_the_system_refuses_is_no_fault_of_the_run_folder(arrays: ImageDataset, monkeypatch) -> None:
    delivery = Delivery(loader(arrays, "torch"))
    monkeypatch.setattr(type(delivery.stream), "__next__", lambda stream: Path("/nowhere/at/all").read_bytes())
    with pytest.raises(DataError, match="arrays: No such file or directory"):
        take(delivery, 1)


@pytest.mark.parametrize("steps", [(2, 2, 2, 2, 2), (1, 3, 2, 0, 4, 1)], ids=["even", "uneven"])
def test_the_nth_minibatch_of_every_step_lies_in_one_place(arrays: ImageDataset, steps: tuple[int, ...]) -> None:
    """And is what it is without slots, however many a step takes; a checkpoint between two steps or in one knows."""
    plain = Delivery(loader(arrays, "torch"))
    delivery = Delivery(loader(arrays, "torch"), RecordedImageLane(), slots=True)
    places: dict[int, int] = {}
    for count in steps:
        expected = take(plain, count)
        delivery.deliver()
        delivery.begin()
        for number, batch in enumerate(expected):
            resumed = Delivery(loader(arrays, "torch"))
            resumed.load_state_dict(delivery.state_dict())
            found = next(delivery.batches)
            assert places.setdefault(number, found.images.data_ptr()) == found.images.data_ptr()
            assert torch.equal(found.images, batch.images)
            assert torch.equal(found.indices, batch.indices)
            assert torch.equal(take(resumed, 1)[0].indices, batch.indices)
        delivery.end()
        assert delivery.state_dict() == plain.state_dict()


def test_a_step_without_slots_lets_go_of_its_minibatches(arrays: ImageDataset) -> None:
    """One that takes hundreds holds as many as it wants to."""
    delivery = Delivery(loader(arrays, "torch"))
    delivery.begin()
    images = [weakref.ref(next(delivery.batches).images) for _ in range(7)]
    assert sum(image() is not None for image in images) <= 1
    delivery.end()


def test_a_replay_finds_the_next_ones_in_the_slots(arrays: ImageDataset) -> None:
    """`begin` and `next` are not called for it."""
    plain, delivery = Delivery(loader(arrays, "torch")), Delivery(loader(arrays, "torch"), slots=True)
    delivery.begin()
    slots = [next(delivery.batches), next(delivery.batches)]
    delivery.end()
    take(plain, 2)
    for _ in range(6):
        delivery.deliver()
        for slot, batch in zip(slots, take(plain, 2), strict=True):
            assert torch.equal(slot.images, batch.images)
        delivery.end()
        assert delivery.state_dict() == plain.state_dict()


def test_a_captured_step_takes_no_more_than_the_one_before(arrays: ImageDataset, monkeypatch) -> None:
    delivery = Delivery(loader(arrays, "torch"), RecordedImageLane(), slots=True)
    take(delivery, 2)
    delivery.deliver()
    monkeypatch.setattr(RecordedLane, "capturing", True)
    delivery.begin()
    next(delivery.batches), next(delivery.batches)
    with pytest.raises(RuntimeError, match="takes more minibatches of real images than the step before"):
        next(delivery.batches)


@pytest.mark.parametrize("state", [{}, {"epoch": torch.tensor(0)}, {"epoch": torch.tensor(0), "position": 4}])
def test_a_place_that_is_not_there_is_refused(arrays: ImageDataset, state: dict) -> None:
    with pytest.raises((KeyError, ValueError)):
        Delivery(loader(arrays, "torch")).load_state_dict(state)
