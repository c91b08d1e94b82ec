"""Low precision by name, and the CPU's; the memory that a process has used."""

from __future__ import annotations

import resource
import sys
from contextlib import AbstractContextManager

import torch

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for `dtype` on this CPU; without them PyTorch converts one number after the other."""
    supported = getattr(torch.ops.mkldnn, _SUPPORT[dtype], None) if torch.backends.mkldnn.is_available() else None
    return supported is not None and bool(supported())


def repeatable() -> AbstractContextManager[None]:
    """Inside, cuDNN computes the same bits every time; what it chooses by measuring, or sums by atomics, is left out.

    `cudnn.flags` sets what it isn't told: without `enabled` it would switch cuDNN off.
    """
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32)


def reset_peak_memory(device: torch.device) -> None:
    """`peak_memory` counts from here on where it can: on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's largest resident size elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
