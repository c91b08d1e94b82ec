"""The two orders of a tap's features: (H, W, C) in memory, (C, H, W) in public."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.representation.extractor import Tap


class FeatureOrder:
    """Where each tap's features lie in a flat `[D]` buffer, and the way between the two orders of a tap.

    Kernels keep every tap in the memory order of its activations, (H, W, C); everything public is in (C, H, W).
    """

    def __init__(self, taps: tuple[Tap, ...]):
        self.taps = taps
        self.sizes = [tap.num_features for tap in taps]

    def slices(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """Views of `buffer` [D], one per tap; of several such buffers in a row, those of one after the other."""
        return buffer.split(self.sizes * (len(buffer) // sum(self.sizes)))

    def to_memory(self, public: Tensor) -> Tensor:
        """[..., D] in public order to memory order."""
        return torch.cat(
            [
                part.unflatten(-1, tap.shape).movedim(-3, -1).flatten(-3)
                for part, tap in zip(public.split(self.sizes, dim=-1), self.taps, strict=True)
            ],
            dim=-1,
        )

    def to_public(self, memory: Tensor) -> Tensor:
        """[..., D] in memory order to public order."""
        return torch.cat(
            [
                part.unflatten(-1, (*tap.shape[1:], tap.shape[0])).movedim(-1, -3).flatten(-3)
                for part, tap in zip(memory.split(self.sizes, dim=-1), self.taps, strict=True)
            ],
            dim=-1,
        )
