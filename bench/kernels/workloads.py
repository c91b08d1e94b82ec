"""What the engine asks of the kernels: taps, launches, and the same maths in plain PyTorch."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from engine.representation.build import build_extractor
from engine.representation.tracing.tap import is_visit
from engine.training.planner import FakeMode, fake_copy
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
    """A tap as a kernel sees it, and the convolutions since the tap before.

    Attributes:
        shape: (C, H, W) of its activations.
        residual: whether a shortcut is added.
        bias: whether it adds the biases that convolutions leave to it.
        biased: values of an image that come out of those convolutions which have a bias.
        biased_before: of these, those to which the convolutions have added it themselves.
        readers: how many later layers read it, and so how many gradients come back to it.
    """

    shape: tuple[int, int, int]
    residual: bool
    bias: bool = False
    biased: int = field(default=0, compare=False)
    biased_before: int = field(default=0, compare=False)
    readers: int = 1

    @property
    def features(self) -> int:
        """F = C·H·W."""
        return math.prod(self.shape)


class _Biased(TorchDispatchMode):
    """Counts what comes out of convolutions that are called with a bias, since `take` was called."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and args[2] is not None:
            self.values += result.numel()
        return result

    def take(self) -> int:
        """The number, which begins again at 0."""
        values, self.values = self.values, 0
        return values


def taps_of(name: str, image_size: int) -> list[TapShape]:
    """All taps of an extractor, in order, as it runs on CUDA: from one image without memory."""
    mode = FakeMode()
    plain = fake_copy(build_extractor(name, image_size=image_size), mode)
    ours = plain.prepared()
    seen: dict[int, list[TapShape]] = {}
    for extractor in (plain, ours):
        with mode, torch.no_grad(), _Biased() as biased:

            def visit(index: int, x: Tensor, residual: Tensor | None, extractor=extractor, biased=biased) -> Tensor:
                shape, has_bias = (x.shape[1], x.shape[2], x.shape[3]), extractor.sites[index].bias is not None
                tap = TapShape(shape, residual is not None, has_bias, biased.take())
                seen.setdefault(index, []).append(tap)
                return x

            extractor(torch.empty(1, 3, image_size, image_size), visit)
    readers: dict[int, int] = {}
    for graph in (module.graph for module in plain.modules() if isinstance(module, fx.GraphModule)):
        for node in filter(is_visit, graph.nodes):
            readers[node.args[1]] = sum(user.op != "output" for user in node.users)
    return [
        dataclasses.replace(engines, biased=users.biased, biased_before=engines.biased, readers=readers[index])
        for index, (users, engines) in seen.items()
    ]


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
        return cls(tensor.dtype, int(tensor.storage_offset()) * tensor.element_size())

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
        processors = self.processors
        if processors is not None:
            self._stack.enter_context(patch.object(launching, "processors", lambda device: processors))
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


# Features of two sets, and the widths of a Gaussian mixture that suit the distances between them.
PAIRS = (4096, 4096, 512)
WIDTHS = (8.0, 16.0, 32.0, 64.0, 128.0)


def plain_pairwise(x: Tensor, y: Tensor, widths: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What one writes without kernels: Σ_j k(x_i, y_j) of the Gaussian mixture, and its gradient by autograd."""
    x = x.detach().requires_grad_()
    squares = torch.cdist(x, y).square()
    sums = torch.stack([torch.exp(squares * (-0.5 / width**2)).sum(dim=1) for width in widths]).sum(dim=0)
    return sums.detach(), torch.autograd.grad(sums.sum(), x)[0]
