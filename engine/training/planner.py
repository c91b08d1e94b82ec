"""How much memory a training step will need: worked out on tensors without memory.

A step runs twice on fake CPU tensors (PyTorch's FakeTensorMode: shapes and strides, no data) while a dispatch mode sees
every storage come and go. Nothing here knows what a step consists of, so whatever a method does is modelled as it is
written. `engine.configuration.planning` plans a configuration with it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine.support.errors import InputError
from engine.support.files import total_memory

_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Footprint:
    """Bytes that training is modelled to need.

    Attributes:
        weights: parameters and buffers of generator and extractor, as they were before anything else was made.
        between_steps: what else is there between two steps: the low-precision copy of the extractor, the
            target, the averager's and the optimizer's state, the moving average of the generator, the generator's
            gradients.
        peak: the most that is there at the same time during a step besides the weights: `between_steps`, images,
            activations, moments, coefficients, gradients, and what operators return to each other.
    """

    weights: int
    between_steps: int
    peak: int

    @property
    def total(self) -> int:
        """Bytes with the weights."""
        return self.weights + self.peak


class FakeMode(FakeTensorMode):
    """FakeTensorMode whose tensors can be copied with the modules that hold them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeMode:
        return self


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, for as long as anybody holds them.

    Views share their storage and in-place operators make none. What an operator allocates for itself and frees before
    it returns is not seen: neither a library's workspaces, nor PyTorch's own kernels from the inside.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()):
        """Storages of `ignored` don't count."""
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in ignored)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.count(value)
        return result

    def count(self, tensor: Tensor) -> None:
        """`tensor`'s storage from now on until it goes."""
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def fake_copy(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> Any:
    """`module` with fake CPU tensors (the floating ones in `dtype`) in place of its own. Allocates nothing."""
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*module.parameters(), *module.buffers()):
            kept = dtype is None or not tensor.is_floating_point()
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype if kept else dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
    return copy.deepcopy(module, memo)


def num_bytes(*modules: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


def track(build: Callable[[], Callable[[], object]], mode: FakeTensorMode, weights: Sequence[nn.Module]) -> Footprint:
    """The footprint of the step that `build()` returns, from its second call: then all optimizer state exists.

    Args:
        build: runs under `mode`; makes everything that a step needs besides `weights`, on fake tensors.
        weights: modules with fake tensors, which don't count.
    """
    tensors = [tensor for module in weights for tensor in (*module.parameters(), *module.buffers())]
    tracker = StorageTracker(tensors)
    with mode, tracker:
        step = build()
        step()
        tracker.peak = between_steps = tracker.now
        step()
    return Footprint(sum(tensor.nbytes for tensor in tensors), between_steps, tracker.peak)


def memory_limit() -> int:
    """Bytes of RAM that a process may have: the control group's limit, or all that there is."""
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        return min(total_memory(), int((_GROUP / "memory.max").read_text()))
    return total_memory()


def available_memory() -> int:
    """Bytes of RAM that are free without swapping: Linux's MemAvailable within the control group's limit, elsewhere
    free pages or half of all."""
    limit, used = (_GROUP / name for name in ("memory.max", "memory.current"))
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        return min(_available(), int(limit.read_text()) - int(used.read_text()))
    return _available()


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return total_memory() // 2
    raise InputError("memory_budget", "this system does not tell how much memory is free; give a size")


def shown_bytes(count: float) -> str:
    """Such as "1.50 GiB", or "12.3 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
