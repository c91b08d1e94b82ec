"""Several networks side by side: on CUDA each on a stream of its own.

Deep layers of one network leave most of a GPU idle: 4×4 maps of 64 images fill a few multiprocessors. In a CUDA graph
the streams become branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


class Branches:
    """Runs calls that don't depend on each other.

    Args:
        device: of the tensors that the calls work on.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.streams: list[torch.cuda.Stream] = []

    def run(self, calls: Sequence[Callable[[], T]], *, last_first: bool = False) -> list[T]:
        """The calls' results. On CUDA the calls may overlap, but with nothing before or after.

        Call number n always runs on the same stream. So no tensor has to be recorded on a stream: memory that a call
        frees is used again on that stream, or after all of them have been waited for.

        Args:
            last_first: begin with the last call.
        """
        order = range(len(calls))[:: -1 if last_first else 1]
        results: dict[int, T] = {}
        if self.device.type != "cuda" or len(calls) == 1:
            for n in order:
                results[n] = calls[n]()
            return [results[n] for n in range(len(calls))]
        before = torch.cuda.current_stream(self.device)
        while len(self.streams) < len(calls) - 1:
            self.streams.append(torch.cuda.Stream(self.device))
        branches = [before, *self.streams[: len(calls) - 1]]
        for branch in branches[1:]:
            branch.wait_stream(before)
        for n in order:
            with torch.cuda.stream(branches[n]):
                results[n] = calls[n]()
        for branch in branches[1:]:
            before.wait_stream(branch)
        return [results[n] for n in range(len(calls))]
