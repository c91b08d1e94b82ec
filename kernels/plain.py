"""Steps in plain PyTorch that several backends share, on any device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kernels.layout import accumulation_dtype, feature_rows

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


def watch(loss: Tensor, step: Tensor, first_bad: Tensor) -> None:
    """See `kernels.watch`."""
    step += 1
    first_bad.copy_(torch.where(loss.isfinite(), first_bad, torch.minimum(first_bad, step)))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast: it would multiply in half precision what is subtracted next."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def mean_row(x: Tensor, y: Tensor | None) -> Tensor:
    """The mean [F] of all rows of both, in `accumulation_dtype`; distances don't change when both are moved by it."""
    dtype = accumulation_dtype(x.dtype)
    if y is None:
        return x.mean(dim=0, dtype=dtype)
    return (x.sum(dim=0, dtype=dtype) + y.sum(dim=0, dtype=dtype)) / (len(x) + len(y))


def linear_sums(x: Tensor, y: Tensor | None, diagonal: bool, gradient: bool) -> tuple[Tensor, Tensor]:
    """`kernels.pairwise_sums` of the linear kernel: Σ_j x_i·y_j = x_i·Σ_j y_j, so there are no pairs to look at."""
    total = (x if y is None else y).sum(dim=0, dtype=torch.float64)
    dtype = accumulation_dtype(x.dtype)
    sums = x.new_empty(len(x), dtype=torch.float64)
    slopes = x.new_empty(len(x) if gradient else 0, x.shape[1], dtype=dtype)
    for start in range(0, len(x), block := max(_BLOCK // x.shape[1], 1)):
        rows = x[start : start + block].double()
        toward = total if diagonal else total - rows
        torch.sum(rows * toward, dim=1, out=sums[start : start + block])
        if gradient:
            slopes[start : start + block] = toward
    return sums, slopes


def squared_differences(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """‖x_i − y_index(i)‖² [n], in `accumulation_dtype`, from the differences: no digit is lost."""
    dtype, found = accumulation_dtype(x.dtype), []
    for rows, indices in zip(*(torch.split(part, max(_BLOCK // x.shape[1], 1)) for part in (x, index)), strict=True):
        found.append((rows.to(dtype) - y[indices].to(dtype)).square_().sum(dim=1))
    return torch.cat(found)
