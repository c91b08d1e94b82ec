"""A step of pretraining on a GPU waits for nothing: seen on fake CUDA tensors, which need no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.representation.architectures import find_architecture
from engine.representation.pretraining import images as sources
from engine.representation.pretraining.recipe import Recipe
from engine.representation.pretraining.tasks import make_task
from engine.representation.pretraining.training import Pretraining
from pipelines import open_dataset, sent

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
READS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero")
"""Operators that give the CPU what only the device knows."""


class Waits(TorchDispatchMode):
    """Lists what would block: copies between devices that are not from pinned memory, and reads of the device.

    Attributes:
        found: the operators, in order.
        copies: how many did not block.
    """

    def __init__(self, pinned: set[int]):
        super().__init__()
        self.pinned, self.found, self.copies = pinned, [], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        name = func.overloadpacket.__name__
        on_gpu = any(tensor.device.type == "cuda" for tensor in given)
        masks = name.startswith("index") and any(tensor.dtype is torch.bool for tensor in given[1:])
        if on_gpu and (name in READS or masks):
            self.found.append(name)
        result = func(*args, **kwargs)
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if any(tensor.dim() and tensor.device.type == "cpu" for tensor in given):
            if on_gpu and name != "copy_":
                self.found.append(f"{name} of both devices")
            elif on_gpu or any(tensor.device.type == "cuda" for tensor in made):
                source = given[-1]
                asynchronous = kwargs.get("non_blocking", False) or True in args[2:]
                if not (asynchronous and id(source) in self.pinned):
                    self.found.append(name)
                else:
                    self.copies += 1
        return result


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Inside, tensors have no memory, "cuda" is a device, and memory is pinned by being remembered as such."""
    kept: list[Tensor] = []  # so that no other tensor gets its id

    def pin(tensor: Tensor, *_: Any) -> Tensor:
        copy = tensor.clone()
        kept.append(copy)
        waits.pinned.add(id(copy))
        return copy

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    # Fake parameters cannot be moved; they are made where they shall be.
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)
    waits = Waits(set())
    with FakeTensorMode(allow_non_fake_inputs=True), waits:
        yield waits


@pytest.mark.parametrize("place", [CUDA, CPU], ids=["pictures on the device", "pictures on the CPU"])
@pytest.mark.parametrize("task", ["classify", "rotate", "autoencode"])
def test_a_step_waits_for_nothing(task: str, place: torch.device, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=pictures, labels=np.arange(40) % 2)
    dataset = open_dataset("images", tmp_path / "data.npz", image_size=32)
    # The engine's thread that runs backward needs a real device.
    monkeypatch.setattr(Tensor, "backward", lambda loss: None)
    with fake_gpu(monkeypatch) as waits:
        source = sources._InMemory(
            torch.empty(40, 32, 32, 3, dtype=torch.uint8, device=place), torch.arange(40), 8, seed=0, device=CUDA
        )
        with CUDA:
            made = make_task(task, find_architecture("vgg-small", 32), dataset)
        pretraining = Pretraining(made, source, torch.arange(40) % 2, Recipe(steps=2, batch_size=8), device=CUDA)
        for images, shown in source.epoch(0, 0):
            pretraining._take_step(images, shown)
    assert pretraining.step == source.steps_per_epoch
    assert waits.found == []
    # Which images (or the images themselves), how they are augmented, and their labels.
    assert waits.copies == 3 * pretraining.step


@pytest.mark.parametrize("fits", [True, False])
def test_pictures_stay_in_the_cpus_memory_where_a_gpu_has_little(fits: bool, tmp_path, monkeypatch) -> None:
    np.save(tmp_path / "data.npy", np.zeros((40, 16, 16, 3), np.uint8))
    dataset = open_dataset("images", tmp_path / "data.npy", image_size=16)
    moved: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 16 * 16 * 3 * 4 - (not fits), 10**12))
    monkeypatch.setattr(Tensor, "to", lambda tensor, device: (moved.append(device), tensor)[1])
    source = sources.open_images(dataset, 8, seed=0, device=CUDA)
    assert moved == ([CUDA] if fits else [])
    assert source.images.shape == (40, 16, 16, 3)


@pytest.mark.parametrize("blocking", [False, True], ids=["pinned", "pageable"])
def test_the_lint_sees_what_waits(blocking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch) as waits:
        x, places = torch.zeros(4, device=CUDA), torch.arange(4)
        x[places.to(CUDA) if blocking else sent(places, CUDA)]
        if blocking:
            with pytest.raises(DynamicOutputShapeException):
                x[x > 0]
    assert waits.found == (["_to_copy", "index"] if blocking else [])


def test_a_streamed_batch_drops_held_out_images_without_asking_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        def batches(self, first: int) -> Iterator[Any]:
            indices = torch.arange(5)
            yield type("Batch", (), {"images": torch.zeros(5, 3, 8, 8, device=CUDA), "indices": indices})

    source = object.__new__(sources._Streamed)
    source.loader, source.is_outside = Loader(), np.array([False, True, False, False, True])
    source.dataset = type("Data", (), {"pictures": staticmethod(lambda indices: (indices, None))})
    with fake_gpu(monkeypatch) as waits:
        monkeypatch.setattr(Tensor, "numpy", lambda tensor: np.arange(5))
        ((images, shown),) = source.epoch(0, 0)
    assert (images.shape[0], shown.shape[0]) == (3, 3)
    assert (waits.found, waits.copies) == ([], 1)


def test_what_is_sent_to_a_cpu_is_the_tensor_itself() -> None:
    tensor = torch.arange(3)
    assert sent(tensor, torch.device("cpu")) is tensor


@pytest.mark.parametrize("task", ["classify", "autoencode"])
def test_the_optimizer_is_one_kernel_on_a_gpu_alone(task: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((40, 32, 32, 3), np.uint8), labels=np.arange(40) % 2)
    dataset = open_dataset("images", tmp_path / "data.npz", image_size=32)

    def optimizer(device: torch.device) -> torch.optim.Optimizer:
        source = sources._InMemory(
            torch.empty(40, 32, 32, 3, dtype=torch.uint8), torch.arange(40), 8, seed=0, device=device
        )
        with device:
            made = make_task(task, find_architecture("vgg-small", 32), dataset)
        return Pretraining(made, source, None, Recipe(steps=1, batch_size=8), device=device).optimizer

    assert not optimizer(torch.device("cpu")).param_groups[0]["fused"]
    with fake_gpu(monkeypatch):
        assert optimizer(CUDA).param_groups[0]["fused"]
