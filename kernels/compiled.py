"""The three operations through torch.compile: one fused loop each on a CPU.

The same maths as `reference`, arranged so that Inductor reads every activation once: sums around a pilot value
(the running mean, or the first image when nothing has been merged yet) give mean and centred second moment in a
single pass without the cancellation of raw sums. Shapes are dynamic, so neither another minibatch size nor another
tap compiles anything again, and Inductor's own cache keeps the result between runs.
"""

from __future__ import annotations

import os
import shutil
import sys

import torch
import torch._dynamo
import torch._inductor
from torch import Tensor

from kernels.layout import accumulation_dtype, feature_rows, is_channels_last


def _activate(value: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return value.clamp(min=0)
    if activation == "relu6":
        return value.clamp(min=0, max=6)
    return value


def _relu_moments(rows: Tensor, mean: Tensor, m2: Tensor, count: Tensor, bias, residual, activation: str, first: bool):
    value = rows
    if bias is not None:
        value = value + bias
    if residual is not None:
        value = value + residual
    y = _activate(value, activation)
    arriving = rows.shape[0]
    pilot = y[0].to(mean.dtype) if first else mean
    centred = y.to(mean.dtype) - pilot
    first_sum, second_sum = centred.sum(dim=0), centred.square().sum(dim=0)
    rows.copy_(y)
    offset = first_sum / arriving
    arriving_m2 = second_sum - first_sum * offset
    if first:
        mean.copy_(pilot + offset)
        m2.copy_(arriving_m2)
    else:
        total = count + arriving
        m2.copy_(m2 + arriving_m2 + offset * offset * (count * arriving / total))
        mean.copy_(mean + offset * (arriving / total))


def _relu_moments_backward(grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str):
    value = y.to(a.dtype)
    gradient = grad.to(a.dtype) + a + b * value
    if activation == "relu":
        gradient = torch.where(y > 0, gradient, 0)
    elif activation == "relu6":
        gradient = torch.where((y > 0) & (y < 6), gradient, 0)
    grad.copy_(gradient)


def _averager_step(
    mean, m2, target_mean, target_variance, v, m, u, weight, scalars, fresh, rule: str, advance: bool
) -> tuple[Tensor, Tensor, Tensor]:
    count, dof, rate, decay1, decay2, eps, correct1, correct2 = scalars.unbind()
    moments = torch.stack((mean, m2 / dof))
    target = torch.stack((target_mean, target_variance))
    difference = target - moments
    if weight is not None:
        scale = torch.stack((weight, weight.square()))
        difference = scale * difference
    if rule == "ama":
        if advance:
            g = v - difference
            new_m = m + decay1 * (g - m)
            new_u = u + decay2 * (g * g - u)
            new_v = v - rate * (new_m / correct1) / ((new_u / correct2).sqrt() + eps)
            m.copy_(new_m)
            u.copy_(new_u)
            v.copy_(new_v)
            direction = new_v
        else:
            direction = v
        loss = direction * difference
    elif rule == "ma":
        direction = v
        if advance:
            direction = v + rate * (difference - v)
            v.copy_(direction)
        loss = direction * difference
    elif rule == "ma_moments":
        moved = v + rate * (moments - v) if advance else v
        average = torch.where(fresh, moments, moved)
        if advance:
            v.copy_(average)
        residual = target - average
        if weight is not None:
            residual = scale * residual
        features = mean.shape[0]
        direction, loss = residual * (2 * rate / features), residual.square() / features
    else:
        direction, loss = 2 * difference, difference.square()
    weighted = direction if weight is None else scale * direction
    b = weighted[1] * (-2 / dof)
    a = -weighted[0] / count - b * mean
    return a, b, torch.cat((loss.sum(dim=1), difference.square().sum(dim=1)))


# One variant per dtype, activation, presence of a shortcut and of earlier moments; never one per shape.
_compile = torch.compile(dynamic=True, fullgraph=True, recompile_limit=64)
_relu_moments_kernel = _compile(_relu_moments)
_relu_moments_backward_kernel = _compile(_relu_moments_backward)
_averager_step_kernel = _compile(_averager_step)


def _rows(x: Tensor) -> Tensor:
    """`feature_rows` without the view relation, whose base's shape would otherwise be guarded on."""
    return feature_rows(x).data


def _bias_row(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """`bias` [C] repeated over positions into one row [F] in the memory order of `x`."""
    if bias is None:
        return None
    _, channels, height, width = x.shape
    if is_channels_last(x):
        return bias.repeat(height * width)
    return bias.view(channels, 1).expand(channels, height * width).reshape(-1)


@torch.no_grad()
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
    rows = _rows(x)
    shortcut = None if residual is None else _rows(residual)
    merged = torch.tensor(float(count), dtype=mean.dtype, device=mean.device)
    _relu_moments_kernel(rows, mean.data, m2.data, merged, _bias_row(bias, x), shortcut, activation, count == 0)


@torch.no_grad()
def relu_moments_backward(grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str = "relu") -> None:
    """See `kernels.relu_moments_backward`."""
    _relu_moments_backward_kernel(_rows(grad), _rows(y), a.data, b.data, activation)


@torch.no_grad()
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
    fresh = step == 0
    if advance and rule != "none":
        step += 1
    t = step.double()
    # Bias corrections in float64: 1 - 0.999 in float32 is already off by 1.3e-5.
    corrections = torch.stack((1 - beta1**t, 1 - beta2**t)).to(mean.dtype)
    constants = mean.new_tensor([count, count - correction, rate, 1 - beta1, 1 - beta2, eps])
    scalars = torch.cat((constants, corrections))
    return _averager_step_kernel(mean, m2, target_mean, target_variance, v, m, u, weight, scalars, fresh, rule, advance)


def works(dtype: torch.dtype) -> str | None:
    """None if torch.compile can build code here, else the reason in one line.

    The trial is the forward operation itself, so that what it compiles is not wasted.
    """
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on the PATH"
    try:
        buffers = torch.zeros(2, 32, dtype=accumulation_dtype(dtype))
        relu_moments(torch.zeros(4, 8, 2, 2, dtype=dtype), buffers[0], buffers[1], 0)
    except (torch._inductor.exc.InductorError, torch._dynamo.exc.TorchDynamoException) as error:
        return f"{compiler} cannot build Inductor's code ({str(error).strip().splitlines()[0]})"
    return None
