"""Which rows of the minibatch that W ranks share are a rank's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.training.ranks import Ranks


@dataclass(frozen=True)
class Rows:
    """Some consecutive images of a minibatch: those from `start` to `stop`, of `total` on all ranks."""

    start: int
    stop: int
    total: int

    @classmethod
    def all_of(cls, images: Tensor) -> Rows:
        """A whole minibatch."""
        return cls(0, len(images), len(images))

    @classmethod
    def of_ranks(cls, count: int, ranks: Ranks) -> Rows:
        """This rank's `count` images of the minibatch that all ranks have together, in rank order."""
        counts = ranks.counts(count)
        start = sum(counts[: ranks.rank])
        return cls(start, start + count, sum(counts))

    def within(self, start: int, stop: int) -> int:
        """How many of these images are among those from `start` to `stop`."""
        return max(0, min(self.stop, stop) - max(self.start, start))
