"""Steps in plain PyTorch that several backends share, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layout import feature_rows

_BLOCK = 2**22  # features × images converted to float64 at once (32 MiB)


def activate_(x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
    """`x ← activation(x + bias + residual)` in place; x [N, C, H, W], bias [C]; "relu", "relu6" or "none"."""
    if bias is not None:
        x += bias.view(-1, 1, 1)
    if residual is not None:
        x += residual
    if activation != "none":
        x.clamp_(min=0, max=6 if activation == "relu6" else None)


def with_totals(sums: Tensor) -> Tensor:
    """[4] and the sums of its two halves, [6]."""
    return torch.cat((sums, sums.view(2, 2).sum(dim=1)))


def dataset_moments(
    x: Tensor,
    mean: Tensor,
    m2: Tensor,
    count: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    images: int = 0,
) -> None:
    """See `kernels.dataset_moments`: two passes over blocks of images, which are converted to float64."""
    activate_(x, bias, residual, activation)
    if count == 0:
        mean.zero_()
        m2.zero_()
    rows = feature_rows(x)
    for part in torch.split(rows, max(_BLOCK // rows.shape[1], 1)):
        arriving = len(part)
        values = part.to(torch.float64)
        arriving_mean = values.mean(dim=0)
        squares = values.sub(arriving_mean).square_().sum(dim=0)
        total = count + arriving
        delta = arriving_mean.sub_(mean)
        m2 += squares.addcmul_(delta, delta, value=count * arriving / total)
        mean += delta.mul_(arriving / total)
        count = total
