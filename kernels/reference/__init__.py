"""The operations in plain PyTorch: the oracle that every other backend is tested against.

Runs on any device and in any floating dtype up to float64. Accumulation is in float32 for low-precision
activations and in the activations' own dtype otherwise, which is what `accumulation_dtype` says.
"""

from kernels.reference.averaging import (
    average_moments,
    averager_step,
    coefficients,
    difference,
    direction,
    matching_loss,
    totals,
)
from kernels.reference.moments import dataset_moments, relu_moments, relu_moments_backward
from kernels.reference.pairwise import nearest, pairwise_sums
from kernels.reference.watching import watch

__all__ = [
    "average_moments",
    "averager_step",
    "coefficients",
    "dataset_moments",
    "difference",
    "direction",
    "matching_loss",
    "nearest",
    "pairwise_sums",
    "relu_moments",
    "relu_moments_backward",
    "totals",
    "watch",
]
