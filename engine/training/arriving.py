"""What ranks get from each other while they go on computing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist


class Mergeable(Protocol):
    """Moments of a set of images; further attributes are those of all ranks."""

    count: int
    mean: torch.Tensor
    m2: torch.Tensor

    def merge(self: M, other: M) -> M:
        """Moments of both sets."""
        ...


M = TypeVar("M", bound=Mergeable)


class Arriving:
    """Everybody's tensors of one shape, on their way since this was made.

    NCCL moves them on a stream of its own. That one waits for what the stream that is current here has been told so
    far, and for nothing that it is told later. `wait` lets the stream that is current there wait for NCCL's, and not
    the host (unless TORCH_NCCL_BLOCKING_WAIT is set, with which nothing can be captured). A collective on the current
    stream, as `Ranks.sum_` is, has to come before all that are on their way, or after they have been waited for: then
    any two of one communicator have an order on the device, the same on every rank.

    Args:
        own: this rank's, which must not change before `wait`.
        size: number of ranks.
        together: what a collective is called in.
    """

    def __init__(self, own: torch.Tensor, size: int, together: Callable[[], AbstractContextManager[None]]):
        # Both are kept until `wait`: the streams of the device don't know of each other's memory.
        self.own, self.everybody = own.contiguous(), own.new_empty(size, *own.shape)
        self._together = together
        with together():
            self._work = dist.all_gather_single(self.everybody.flatten(), self.own.flatten(), async_op=True)

    def wait(self) -> torch.Tensor:
        """[W, *shape], in rank order."""
        if self._work is not None:
            with self._together():
                self._work.wait()
            self._work = None
        return self.everybody


class Merging(Generic[M]):
    """The moments of all ranks' images, some features after others: those that are known travel while the next ones
    are computed.

        merging = ranks.merging(count)
        merging.start(moments)         # of some features; all ranks start the same ones in the same order
        merging.start(moments)         # of others
        first, second = merging.wait()

    Every rank gets mean and M2 of all, 2·D numbers of each, and merges them in rank order: the same bits on all of
    them, in whichever portions features come. Counts are told once, from the beginning on. Alone, nothing is done.

    On CUDA, `start` belongs on the stream that computed the moments, and `wait` on one that has waited for all such
    streams. What `wait` lets go was allocated on the former, which may only use it again after they have waited for
    the latter. That is how `engine.representation.branches` begins.

    Args:
        counts: waits for everybody's number of images, in rank order.
        gather: sends a tensor on its way to all; None if there is nobody else.
    """

    def __init__(self, counts: Callable[[], list[int]], gather: Callable[[torch.Tensor], Arriving] | None):
        self._counts, self._gather = counts, gather
        self._started: list[tuple[M, Arriving | None]] = []

    def start(self, moments: M) -> None:
        """Send the moments of some features on their way: a copy, so that their memory may be used again."""
        arriving = None if self._gather is None else self._gather(torch.cat((moments.mean, moments.m2)))
        self._started.append((moments, arriving))

    def wait(self) -> list[M]:
        """What was started, of all ranks."""
        counts, started = self._counts(), self._started
        self._started = []
        return [own if arriving is None else _merged(own, arriving.wait(), counts) for own, arriving in started]


def _merged(own: M, everybody: torch.Tensor, counts: Sequence[int]) -> M:
    parts = []
    for count, (mean, m2) in zip(counts, everybody.unflatten(1, (2, -1)).unbind(), strict=True):
        if count:  # else the buffers hold whatever was there
            part = copy.copy(own)
            part.count, part.mean, part.m2 = count, mean, m2
            parts.append(part)
    return functools.reduce(lambda merged, part: merged.merge(part), parts)
