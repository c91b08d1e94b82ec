"""The watch over the loss, in Triton: one program, where plain PyTorch launches eight kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.operators import operator
from kernels.triton import launching


@triton.jit
def watch_kernel(
    loss_ptr,  # [] of any floating dtype; only read
    step_ptr,  # [] int64, counted up
    first_bad_ptr,  # [] int64, the smaller of itself and the step where the loss is not finite
):
    """`step` counts, and `first_bad` keeps the first step whose loss was not finite."""
    step = tl.load(step_ptr) + 1
    # In float64: what float32 cannot hold is finite all the same. NaN compares false with everything.
    finite = tl.abs(tl.load(loss_ptr).to(tl.float64)) < float("inf")
    first_bad = tl.load(first_bad_ptr)
    tl.store(step_ptr, step)
    tl.store(first_bad_ptr, tl.where(finite, first_bad, tl.minimum(first_bad, step)))


@operator("triton")
def watch(loss: Tensor, step: Tensor, first_bad: Tensor) -> None:
    """See `kernels.watch`."""
    launching.launch(watch_kernel, loss.device, (1,), loss, step, first_bad, num_warps=1)
