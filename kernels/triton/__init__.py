"""The operations in Triton: CUDA devices, and a CPU inside Triton's interpreter (TRITON_INTERPRET=1).

Sizes are runtime arguments, so no shape compiles anything again; what Triton specialises on is whether F is a multiple
of 16 (then rows are aligned) and whether pointers are.
"""

from kernels.triton.averaging import averager_step, averager_step_kernel, sum_partials_kernel
from kernels.triton.launching import INTERPRETED
from kernels.triton.moments import (
    dataset_moments,
    merge_splits_kernel,
    relu_moments,
    relu_moments_backward,
    relu_moments_backward_kernel,
    relu_moments_kernel,
)
from kernels.triton.pairwise import (
    nearest,
    nearest_kernel,
    numbers_kernel,
    pairwise_sums,
    pairwise_sums_kernel,
    weighted_rows_kernel,
)
from kernels.triton.watching import watch, watch_kernel

__all__ = [
    "INTERPRETED",
    "averager_step",
    "averager_step_kernel",
    "dataset_moments",
    "merge_splits_kernel",
    "nearest",
    "nearest_kernel",
    "numbers_kernel",
    "pairwise_sums",
    "pairwise_sums_kernel",
    "relu_moments",
    "relu_moments_backward",
    "relu_moments_backward_kernel",
    "relu_moments_kernel",
    "sum_partials_kernel",
    "watch",
    "watch_kernel",
    "weighted_rows_kernel",
]
