"""How much memory a training step will need: worked out on tensors without memory.

A step runs twice on fake CPU tensors (PyTorch's FakeTensorMode: shapes and strides, no data) while a dispatch mode sees
every storage come and go. Nothing here knows what a step consists of, so whatever a method does is modelled as it is
written. `engine.configuration.planning` plans a configuration with it.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine.support.errors import InputError
from engine.training.ranks import ALONE, Ranks
from pipelines import memory, release_pools

GPU_LIBRARIES = {
    # cuBLAS's documented size for Hopper (4 MiB before): one for the stream of the step, one for that of its capture.
    "cuBLAS's workspaces": 2 * 32 * 2**20,
    # Nothing is documented: what the step's convolutions ask for, and code that is loaded at their first use. Assumed.
    "cuDNN's workspaces and code": 256 * 2**20,
    # Of each pool of PyTorch's allocator, the eager one and the graph's, the segments that are partly used:
    # one of 2 MiB (kSmallBuffer) and one of 20 MiB.
    "partly used segments": 2 * (2 + 20) * 2**20,
}
"""Bytes of a GPU that training needs besides its tensors: modelled, not measured."""
RANKS_LIBRARY = {
    # A buffer of NCCL_BUFFSIZE, 4 MiB by default, for each of some channels to each of some neighbours. Assumed.
    "NCCL's buffers": 256 * 2**20,
}
"""The same, where there are several ranks."""

_WORKSPACES = {"aten::_linalg_eigh": 2, "gfmn_distances::nuclear_norm_": 4}
"""Operator → what it needs, for itself, of a matrix [n, m], in numbers over min(n, m)²: LAPACK's workspace for
eigenvectors; `engine.comparison.distances.polar` has it beside two such matrices."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that training is modelled to need.

    Attributes:
        weights: parameters and buffers of generator and extractor, or of what else is trained, as they were before
            anything else was made.
        between_steps: what else is there between two steps: the low-precision copy of the extractor, the
            target, the averager's and the optimizer's state, the moving average of the generator, the generator's
            gradients.
        peak: the most that is there at the same time during a step besides the weights: `between_steps`, images,
            activations, moments, coefficients, gradients, and what operators return to each other.
        beside: on a GPU, what must be free besides: for libraries, and for what cannot use the step's memory.
    """

    weights: int
    between_steps: int
    peak: int
    beside: int = 0

    @property
    def total(self) -> int:
        """Bytes of all together."""
        return self.weights + self.peak + self.beside


def gpu_block(size: int) -> int:
    """Bytes that PyTorch's allocator takes of a GPU for a tensor of `size` bytes.

    A multiple of 512 bytes, and from 10 MiB on of 2 MiB (c10/core/AllocatorConfig.h: kMinBlockSize, kMinLargeAlloc,
    kRoundLarge).
    """
    unit = 2 * 2**20 if size >= 10 * 2**20 else 512
    return -(-size // unit) * unit


class FakeMode(FakeTensorMode):
    """FakeTensorMode whose tensors can be copied with the modules that hold them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeMode:
        return self


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, for as long as anybody holds them.

    Views share their storage and in-place operators make none. What an operator allocates for itself and frees before
    it returns is not seen: neither a library's workspaces, nor PyTorch's own kernels from the inside. The exceptions
    are gloo's all-gather, and what `_WORKSPACES` says.

    Args:
        ignored: their storages don't count.
        block: bytes that a storage of so many bytes takes.
        gloo: ranks gather by gloo, which receives into a second tensor of the result's size.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, ignored: Iterable[Tensor] = (), block: Callable[[int], int] = int, gloo: bool = False):
        super().__init__()
        self.now = self.peak = 0
        self.block, self.gloo = block, gloo
        self.known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in ignored)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.count(value)
        sides = _WORKSPACES.get(func.name(), 0)
        beside = sides * min(args[0].shape[-2:]) ** 2 * args[0].itemsize if sides else 0
        if self.gloo and func is torch.ops.c10d._allgather_base_.default:
            beside = args[0].nbytes
        self.peak = max(self.peak, self.now + self.block(beside))
        return result

    def count(self, tensor: Tensor) -> None:
        """`tensor`'s storage from now on until it goes."""
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known.add(storage)
        size = self.block(storage.nbytes())
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


def num_bytes(*modules: nn.Module, block: Callable[[int], int] = int) -> int:
    """Of all parameters and buffers, each of which takes `block` of its bytes."""
    return sum(block(tensor.nbytes) for module in modules for tensor in (*module.parameters(), *module.buffers()))


def track(
    build: Callable[[], Callable[[], object]],
    mode: FakeTensorMode,
    weights: Sequence[nn.Module],
    block: Callable[[int], int] = int,
    gloo: bool = False,
    steps: int = 2,
) -> Footprint:
    """The footprint of the step that `build()` returns, from its second call: then all optimizer state exists.

    Args:
        build: runs under `mode`; makes everything that a step needs besides `weights`, on fake tensors.
        weights: modules with fake tensors, which don't count.
        block: bytes that a tensor of so many bytes takes.
        gloo: see `StorageTracker`.
        steps: how many are taken, where they are not all alike. What is there between steps is told before the last.
    """
    tensors = [tensor for module in weights for tensor in (*module.parameters(), *module.buffers())]
    tracker = StorageTracker(tensors, block, gloo)
    with mode, tracker:
        step = build()
        step()
        tracker.peak = tracker.now
        for _ in range(steps - 1):
            between_steps = tracker.now
            step()
    return Footprint(num_bytes(*weights, block=block), between_steps, tracker.peak)


class _ModelledRanks(Ranks):
    """Rank 0, whose share is none of the smaller ones, of a job whose other ranks are not there."""

    def counts(self, own: int) -> list[int]:
        """As if all shares were this one; fake tensors could not tell."""
        return [own] * self.size

    def counting(self, own: int) -> Callable[[], list[int]]:
        return lambda: self.counts(own)

    def _open(self) -> None:
        """`modelled_ranks` has."""


@contextlib.contextmanager
def modelled_ranks(size: int) -> Iterator[Ranks]:
    """For `track`: a rank of `size` that exchanges tensors with nobody, and has the memory for what would come.

    PyTorch's fake process group stands in for the lasting one, so whatever ranks send each other is modelled as it is
    written. It must not be open yet.
    """
    if size == 1:
        yield ALONE
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the group

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield _ModelledRanks(0, size, FakeStore())
    finally:
        dist.destroy_process_group()


def release_memory(device: torch.device) -> None:
    """Before training: give back to a GPU what PyTorch and DALI keep of pretraining and of the statistics pass.

    PyTorch would use its own again, but not for a CUDA graph, whose pool is apart; DALI's pools are no part of either.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        release_pools()


def available_memory() -> int:
    """Bytes of RAM that are free without swapping: Linux's MemAvailable within the control group's limit, elsewhere
    free pages or half of all."""
    limit, used = (memory.GROUP / name for name in ("memory.max", "memory.current"))
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        return min(_available(), int(limit.read_text()) - int(used.read_text()) + _file_cache())
    return _available()


def _file_cache() -> int:
    """Bytes of files in memory that count as the control group's, and that it gives back when it needs them."""
    with contextlib.suppress(OSError, ValueError):
        entries = dict(line.split() for line in (memory.GROUP / "memory.stat").read_text().splitlines())
        return int(entries.get("inactive_file", 0))
    return 0


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return memory.memory_limit() // 2
    raise InputError("memory_budget", "this system does not tell how much memory is free; give a size")


def shown_bytes(count: float) -> str:
    """Such as "1.50 GiB", or "12.3 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
