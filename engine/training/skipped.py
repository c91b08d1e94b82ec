"""Steps that left the weights as they were because a gradient was not finite: counted on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class SkippedSteps:
    """Counts them, in place and without waiting for the device, so that a CUDA graph can hold it.

    Args:
        device: of the steps.
        most: how many in a row are none too many.

    Attributes:
        total, row, longest: how many there were, how many have come last without another between them, and the most
            that ever did; int64, [].
    """

    def __init__(self, device: torch.device, most: int):
        self.most = most
        self.total, self.row, self.longest = (torch.tensor(0, device=device) for _ in range(3))

    @torch.no_grad()
    def take_in(self, skipped: Tensor) -> None:
        """One more step: `skipped` is 1 if it was, else 0."""
        one = skipped.to(torch.int64)
        self.total.add_(one)
        self.row.add_(1).mul_(one)
        torch.maximum(self.longest, self.row, out=self.longest)

    def too_many(self) -> int:
        """How many came in a row if that is more than `most`, else 0. Waits for the device."""
        longest = int(self.longest)
        return longest if longest > self.most else 0

    def state_dict(self) -> dict[str, Tensor]:
        """The counts that the next step depends on."""
        return {"total": self.total, "row": self.row}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`. Longer rows before do not count any more: `most` may have been another."""
        for name, count in self.state_dict().items():
            count.copy_(state[name])
        self.longest.copy_(self.row)
