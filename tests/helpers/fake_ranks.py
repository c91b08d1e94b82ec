"""Helpers: one rank of a large job, alone, in PyTorch's fake process group; and a record of what it sends.

The group answers at once: what is gathered is this rank's tensor W times, and a sum is this rank's tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from engine.training.ranks import Ranks


class FakeRanks(Ranks):
    """A rank whose group is the fake one. CPUs tell each other real numbers, even where tensors are fake."""

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size, FakeStore())
        self._group = True

    def counting(self, own: int) -> Callable[[], list[int]]:
        with unset_fake_temporarily():
            wait = super().counting(own)

        def waited() -> list[int]:
            with unset_fake_temporarily():
                return wait()

        return waited


@contextlib.contextmanager
def fake_ranks(rank: int = 3, size: int = 64) -> Iterator[FakeRanks]:
    """Number `rank` of `size`."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield FakeRanks(rank, size)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Message:
    """A collective.

    Attributes:
        kind: "gather" or "sum".
        nbytes: of this rank's tensor.
        dtype: its dtype.
    """

    kind: str
    nbytes: int
    dtype: torch.dtype


KINDS: dict[Any, tuple[str, Callable[[Any], Tensor]]] = {
    torch.ops.c10d._allgather_base_.default: ("gather", lambda args: args[1]),
    torch.ops.c10d.allreduce_.default: ("sum", lambda args: args[0][0]),
}


class Events(TorchDispatchMode):
    """Keeps in `log` every `Message`, "convolution" for every one of those, and "wait" for every wait for a message."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Message | str] = []

    @property
    def messages(self) -> list[Message]:
        return [entry for entry in self.log if isinstance(entry, Message)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in KINDS:
            kind, own = KINDS[func]
            tensor = own(args)
            self.log.append(Message(kind, tensor.numel() * tensor.itemsize, tensor.dtype))
        elif func.namespace == "c10d":
            raise AssertionError(f"{func} is not among those that a step may use")
        elif "convolution" in func._schema.name:
            self.log.append("convolution")
        return func(*args, **(kwargs or {}))
