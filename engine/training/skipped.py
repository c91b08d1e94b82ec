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
        total, row: how many there were, and how many have come last without another between them; whole numbers of
            float32, [], which a step adds to in two operations.
    """

    def __init__(self, device: torch.device, most: int):
        self.most = most
        self.total, self.row = (torch.tensor(0.0, device=device) for _ in range(2))

    @torch.no_grad()
    def take_in(self, skipped: Tensor) -> None:
        """One more step: `skipped` is 1 if it was, else 0."""
        self.total.add_(skipped)
        torch.addcmul(skipped, self.row, skipped, out=self.row)

    def too_many(self) -> int:
        """How many came last in a row if that is more than `most`, else 0. Waits for the device."""
        row = int(self.row)
        return row if row > self.most else 0

    def state_dict(self) -> dict[str, Tensor]:
        """The counts that the next step depends on."""
        return {"total": self.total, "row": self.row}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for name, count in self.state_dict().items():
            count.copy_(state[name])
