"""DALI's outputs on a GPU, and how tensors get there: shown with stand-ins for what needs a device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines import ImageLoader, open_dataset
from pipelines.loading import torch_loader

CUDA = torch.device("cuda")


class Event:
    """A CUDA event that remembers whether anybody waited for it."""

    made: list[Event]

    def __init__(self) -> None:
        self.recorded = self.waited_for = False
        self.made.append(self)

    def record(self, stream: str) -> None:
        assert stream == "of cpu"  # of the device that copies, and not of the current one
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded
        self.waited_for = True


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """The events that are made in the test, in order."""
    Event.made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    return Event.made


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("fails", [False, True], ids=["to the end", "abandoned"])
def test_no_output_is_released_before_its_copy_is_over(count: int, fails: bool, events: list[Event]) -> None:
    dali_loader = pytest.importorskip("pipelines.loading.dali_loader")
    with pytest.raises(KeyError) if fails else torch.no_grad(), dali_loader.OutputCollector(CUDA) as collect:
        for number in range(count):
            output = torch.full((2, 3, 4, 4), float(number))
            found = collect(SimpleNamespace(as_tensor=lambda output=output: output))
            assert torch.equal(found, output)
            assert found.data_ptr() != output.data_ptr()
            waited = [event.waited_for for event in events]
            assert waited == [True] * max(number + 1 - dali_loader.PREFETCH, 0) + [False] * min(number + 1, 2)
        if fails:
            raise KeyError
    assert len(events) == count
    assert all(event.waited_for for event in events)


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_an_epoch_ends_with_all_copies_over(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dali_loader = pytest.importorskip("pipelines.loading.dali_loader")
    ended: list[int] = []
    leave = dali_loader.OutputCollector.__exit__
    monkeypatch.setattr(
        dali_loader.OutputCollector, "__exit__", lambda self, *error: (ended.append(1), leave(self, *error))[1]
    )
    pictures = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    (tmp_path / "folder").mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "folder" / f"{index}.png")
    where = tmp_path / ("pictures.npy" if kind == "arrays" else "folder")
    loader = ImageLoader(open_dataset("images", where, image_size=16), 4, backend="dali")
    assert sum(len(batch.indices) for batch in loader) == 9
    assert ended == [1]
    abandoned = iter(loader)
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert ended == [1, 1]


def test_the_torch_loader_sends_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Tensor.to` is watched: what it is given, and whether it may run on."""
    pinned, sent = [], []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def to(tensor: Tensor, *given: object, **options: object) -> Tensor:
        if CUDA in given:
            sent.append((any(tensor is one for one in pinned), options))
            return tensor
        return before(tensor, *given, **options)

    before = Tensor.to
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    pictures = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    dataset = SimpleNamespace(images=pictures, pictures=lambda indices: (indices, np.zeros(len(indices), bool)))
    batches = [np.array([3, 1]), np.array([5, 4, 8])]
    found = [indices.tolist() for _, indices in torch_loader._slices(dataset, batches, CUDA)]
    assert found == [[3, 1], [5, 4, 8]]
    whole, *others = sent  # all pictures at the start of the epoch, then the places of each batch
    assert whole == (False, {})
    assert others == [(True, {"non_blocking": True})] * 2


@pytest.mark.requires_gpu
@pytest.mark.parametrize("flip", [False, True])
def test_arrays_on_a_gpu_are_the_same_to_the_last_bit_but_one(flip: bool, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    pictures = np.random.default_rng(0).integers(0, 256, (33, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    dataset = open_dataset("images", tmp_path / "pictures.npy", image_size=16, horizontal_flip=flip)
    on_gpu, on_cpu = (
        torch.cat([batch.images.cpu() for batch in ImageLoader(dataset, 8, device=device, backend=backend)])
        for device, backend in (("cuda", "dali"), ("cpu", "torch"))
    )
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=2**-23)
