"""Helpers: the ranks of a job as threads of one process, which exchange real tensors and take no time to start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.training.ranks import Ranks

T = TypeVar("T")


class _Meeting:
    """Where threads leave what they bring, and take what all have brought."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=60)
        self.brought: list[Any] = [None] * size

    def meet(self, rank: int, what: Any) -> list[Any]:
        self.brought[rank] = what
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


class ThreadRank(Ranks):
    """One of them. `collectives` is what it took part in, in order."""

    def __init__(self, rank: int, size: int, meeting: _Meeting):
        super().__init__(rank, size, None)
        self.meeting, self.collectives = meeting, list[str]()

    def _exchange(self, name: str, what: Any) -> list[Any]:
        """What all of them brought; AssertionError if they came for different things."""
        self.collectives.append(name)
        found = self.meeting.meet(self.rank, (name, what))
        assert {name for name, _ in found} == {name}, found
        return [what for _, what in found]

    def first(self, name: str, make: Callable[[], T]) -> T:
        if self.rank == 0:
            found = make()
            self._exchange(name, None)
            return found
        self._exchange(name, None)
        return make()

    def counting(self, own: int) -> Callable[[], list[int]]:
        counts = self._exchange("counts", own)
        return lambda: counts

    def gather(self, features: Tensor, counts: Callable[[], list[int]] | None = None) -> tuple[Tensor, slice]:
        parts = self._exchange("gather", features.detach().clone())
        start = sum(map(len, parts[: self.rank]))
        return torch.cat(parts), slice(start, start + len(features))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        everybody = self._exchange("sum", [tensor.detach().clone() for tensor in tensors])
        with torch.no_grad():
            for index, tensor in enumerate(tensors):
                tensor.copy_(torch.stack([own[index] for own in everybody]).sum(dim=0))

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        first, *_ = self._exchange("copy", [tensor.detach().clone() for tensor in tensors])
        with torch.no_grad():
            for tensor, value in zip(tensors, first, strict=True):
                tensor.copy_(value)


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of `size` ranks, in order; alone, it runs here."""
    if size == 1:
        return [work(Ranks())]
    meeting = _Meeting(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadRank(rank, size, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        jobs = [threads.submit(run, rank) for rank in range(size)]
    failed = [job.exception() for job in jobs if not isinstance(job.exception(), threading.BrokenBarrierError)]
    if any(failed):
        raise next(filter(None, failed))
    return [job.result() for job in jobs]
