"""What the engine asks of the kernels: taps, launches, and the same maths in plain PyTorch."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from engine.representation.build import build_extractor
from kernels import reference

EXTRACTOR, IMAGE_SIZE, MINIBATCH = "vgg19+resnet18", 32, 64
DTYPE_BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}
AVERAGER_OPTIONS: dict[str, Any] = {
    "rule": "ama", "rate": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "correction": 1, "advance": True,
}  # fmt: skip


def short(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TapShape:
    """A tap as a kernel sees it: (C, H, W) of its activations, and whether a shortcut is added."""

    shape: tuple[int, int, int]
    residual: bool

    @property
    def features(self) -> int:
        """F = C·H·W."""
        return math.prod(self.shape)


def taps_of(name: str, image_size: int) -> list[TapShape]:
    """All taps of an extractor, in order."""
    extractor = build_extractor(name, image_size=image_size)
    taps: list[TapShape] = []

    def visit(index: int, x: Tensor, residual: Tensor | None) -> Tensor:
        taps.append(TapShape((x.shape[1], x.shape[2], x.shape[3]), residual is not None))
        return x

    with torch.no_grad():
        extractor(torch.zeros(1, 3, image_size, image_size), visit)
    return taps


def triton_backend() -> ModuleType:
    """The Triton backend, imported when it is needed: TRITON_INTERPRET counts at that moment."""
    return importlib.import_module("kernels.triton")


@dataclass(frozen=True)
class Pointer:
    """What a compiled kernel depends on of a tensor: its dtype, and how its address is aligned.

    Attributes:
        address: bytes from the beginning of the tensor's memory, which PyTorch aligns to more than any access needs.
    """

    dtype: torch.dtype
    address: int

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        return cls(tensor.dtype, tensor.storage_offset() * tensor.element_size())

    def data_ptr(self) -> int:
        """As Triton asks for it."""
        return self.address

    def element_size(self) -> int:
        """Bytes of one value."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Call:
    """One launch of a Triton kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def argument(self, name: str) -> Any:
        """By the kernel's own name for it."""
        return self.arguments[self.kernel.arg_names.index(name)]


class Recorder:
    """Context in which the Triton backend's launches are recorded instead of done.

    Args:
        processors: multiprocessors of the device; None for what the tensors' device has.

    Attributes:
        calls: the launches, without the tensors' memory.
    """

    def __init__(self, processors: int | None = None):
        self.processors = processors
        self.calls: list[Call] = []

    def __enter__(self) -> Recorder:
        launching = triton_backend().launching
        self._stack = ExitStack()
        self._stack.enter_context(patch.object(launching, "launch", self._record))
        if self.processors is not None:
            self._stack.enter_context(patch.object(launching, "processors", lambda device: self.processors))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _record(self, kernel: Any, device: torch.device, grid: tuple[int, ...], *arguments: Any, **constants: Any):
        seen = (Pointer.to(value) if isinstance(value, Tensor) else value for value in arguments)
        self.calls.append(Call(kernel, grid, tuple(seen), constants))


def plain_forward(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What one writes without kernels: y, and the features' means and variances in float32."""
    y = torch.relu(x if residual is None else x + residual)
    features = y.flatten(1).float()
    return y, features.mean(0), features.var(0)


def plain_backward(
    x: Tensor, outputs: tuple[Tensor, Tensor, Tensor], gradients: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """∂L/∂x by autograd, from the gradients with respect to y (of later layers), means and variances."""
    return torch.autograd.grad(outputs, x, gradients, retain_graph=True)[0]


# The operators' functions themselves: PyTorch's modes and compilers should see into them.
plain_averager: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference.averager_step.__wrapped__  # type: ignore[attr-defined]


def averager_arguments(features: int, device: str) -> list[Any]:
    """Positional arguments of `averager_step`."""
    vectors = [torch.rand(features, device=device) for _ in range(4)]
    state = [torch.rand(2, features, device=device) for _ in range(3)]
    step = torch.zeros((), dtype=torch.int64, device=device)
    return [vectors[0], vectors[1], MINIBATCH, *vectors[2:], *state, step]
