"""Activation and moments, their gradient, and the moments of a dataset, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import plain
from kernels.layout import accumulation_dtype, feature_rows
from kernels.operators import operator


@operator("reference")
def relu_moments(
    x: Tensor,
    mean: Tensor,
    m2: Tensor,
    count: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> None:
    """See `kernels.relu_moments`."""
    plain.activate_(x, bias, residual, activation)
    rows = feature_rows(x).to(mean.dtype)
    arriving = rows.shape[0]
    arriving_m2, arriving_mean = torch.var_mean(rows, dim=0, correction=0)
    arriving_m2 = arriving_m2 * arriving
    if count == 0:
        mean.copy_(arriving_mean)
        m2.copy_(arriving_m2)
        return
    # Chan, Golub, LeVeque 1979: the union's moments from those of two disjoint sets.
    offset = (rows - mean).mean(dim=0)
    total = count + arriving
    m2 += arriving_m2 + offset.square() * (count * arriving / total)
    mean += offset * (arriving / total)


@operator("reference")
def relu_moments_backward(
    grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str = "relu", shortcut: Tensor | None = None
) -> None:
    """See `kernels.relu_moments_backward`."""
    rows = feature_rows(y)
    value = rows.to(accumulation_dtype(y.dtype))
    gradient = feature_rows(grad).to(value.dtype)
    if shortcut is not None:
        gradient = gradient + feature_rows(shortcut)
    gradient = gradient + a + b * value
    # `where`, not a product with the mask: a product would turn 0 · inf into NaN in units that are off.
    if activation == "relu":
        gradient = torch.where(rows > 0, gradient, 0)
    elif activation == "relu6":
        gradient = torch.where((rows > 0) & (rows < 6), gradient, 0)
    feature_rows(grad).copy_(gradient)


dataset_moments = operator("reference")(plain.dataset_moments)
