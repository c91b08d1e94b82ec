"""Low precision by name, and the memory that a process has used."""

from __future__ import annotations

import resource
import sys

import torch

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's largest resident size elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
