"""What this package asks of the machine: how many CPUs it may use, and its one way of a tensor to the device."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def usable_cpus() -> int:
    """CPUs that this process may use; all of them where the system does not tell, as macOS does not."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU `tensor` on `device`. Nothing waits for a GPU: only from pinned memory is a copy to it not a blocking one.

    PyTorch keeps the pinned memory until the copy is over, and uses it again.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
