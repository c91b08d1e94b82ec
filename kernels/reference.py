"""The three operations in plain PyTorch: the oracle that every other backend is tested against.

Runs on any device and in any floating dtype up to float64. Accumulation is in float32 for low-precision
activations and in the activations' own dtype otherwise, which is what `accumulation_dtype` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    if bias is not None:
        x += bias.view(1, -1, 1, 1)
    if residual is not None:
        x += residual
    if activation == "relu":
        x.clamp_(min=0)
    elif activation == "relu6":
        x.clamp_(min=0, max=6)
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
def relu_moments_backward(grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str = "relu") -> None:
    """See `kernels.relu_moments_backward`."""
    rows = feature_rows(y)
    value = rows.to(accumulation_dtype(y.dtype))
    gradient = feature_rows(grad).to(value.dtype) + a + b * value
    # `where`, not a product with the mask: a product would turn 0 · inf into NaN in units that are off.
    if activation == "relu":
        gradient = torch.where(rows > 0, gradient, 0)
    elif activation == "relu6":
        gradient = torch.where((rows > 0) & (rows < 6), gradient, 0)
    feature_rows(grad).copy_(gradient)


@operator("reference")
def averager_step(
    mean: Tensor,
    m2: Tensor,
    count: int,
    target_mean: Tensor,
    target_variance: Tensor,
    v: Tensor,
    m: Tensor,
    u: Tensor,
    step: Tensor,
    *,
    rule: str,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    correction: int,
    advance: bool,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.averager_step`."""
    moments = torch.stack((mean, m2 / (count - correction)))
    target = torch.stack((target_mean, target_variance))
    scale = torch.ones_like(target) if weight is None else torch.stack((weight, weight.square()))
    difference = scale * (target - moments)
    if rule == "ama":
        if advance:
            step += 1
            g = v - difference
            m.lerp_(g, 1 - beta1)
            u.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            t = step.double()
            m_hat = m / (1 - beta1**t).to(m.dtype)
            u_hat = u / (1 - beta2**t).to(u.dtype)
            v -= rate * m_hat / (u_hat.sqrt() + eps)
        direction, loss = v, v * difference
    elif rule == "ma":
        if advance:
            step += 1
            v.lerp_(difference, rate)
        direction, loss = v, v * difference
    elif rule == "ma_moments":
        average = torch.where(step == 0, moments, torch.lerp(v, moments, rate))
        if advance:
            step += 1
            v.copy_(average)
        residual = scale * (target - average)
        features = mean.numel()
        direction, loss = residual * (2 * rate / features), residual.square() / features
    elif rule == "none":
        direction, loss = 2 * difference, difference.square()
    else:
        raise ValueError(f"rule: {rule!r} is not one of ama, ma, ma_moments, none")
    weighted = scale * direction
    b = weighted[1] * (-2 / (count - correction))
    a = -weighted[0] / count - b * mean
    sums = torch.cat((loss.double().sum(dim=1), difference.double().square().sum(dim=1)))
    return a, b, sums
