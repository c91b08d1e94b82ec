"""This package's one way of a tensor to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU `tensor` on `device`. Nothing waits for a GPU: only from pinned memory is a copy to it not a blocking one.

    PyTorch keeps the pinned memory until the copy is over, and uses it again.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
