"""What W ranks need to take the step of one: which rows of a minibatch are a rank's, and BatchNorm over all of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from engine.generation.networks import BatchNorm2d, Summing
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


class _CountedBatchNorm(BatchNorm2d):
    """BatchNorm over all ranks, in a network that no generator counts the batches of."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], see `BatchNorm2d`."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return super().forward(x)


def share_batches(module: nn.Module, ranks: Summing) -> None:
    """From now on the batches of every BatchNorm below `module` are those of all `ranks`.

    PyTorch's own `BatchNorm2d` is replaced; parameters, buffers and their names stay.
    """
    for child in list(module.modules()):
        if isinstance(child, BatchNorm2d):
            child.ranks = ranks
            continue
        for name, norm in list(child.named_children()):
            if type(norm) is nn.BatchNorm2d:
                setattr(child, name, _counted(norm, ranks))


def _counted(norm: nn.BatchNorm2d, ranks: Summing) -> BatchNorm2d:
    counted = _CountedBatchNorm(norm.num_features, norm.eps, norm.momentum).train(norm.training)
    for name, parameter in norm.named_parameters():
        setattr(counted, name, parameter)
    for name, buffer in norm.named_buffers():
        setattr(counted, name, buffer)
    counted.ranks = ranks
    return counted
