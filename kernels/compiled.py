"""The three operations through torch.compile: fused, vectorised, threaded loops on a CPU.

The same maths as `reference`, arranged for Inductor:

- Sums around a pilot value (the running mean, or the first image before there is one) give mean and centred second
  moment in one pass, without the cancellation of raw sums. The pilot lives in `mean` before the kernel starts, so
  merging into earlier moments and starting afresh are one kernel.
- The averager sees means and variances as separate rows, which Inductor turns into one loop over all D features; as
  one [2, D] tensor they become four.
- Sizes are dynamic and threads are counted when a kernel runs, so neither another minibatch, nor another tap, nor the
  size that happened to come first matters. What would still compile again is kept away from the kernels: a single
  image (size 1 is special to PyTorch) is doubled, and more than `MAX_ROWS` images (where Inductor changes its way to
  sum) are merged slice by slice.

One kernel per dtype, activation and presence of bias and shortcut; Inductor's own cache keeps them between runs.
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

# Inductor sums more than 4096 terms with a compensating helper, which is another kernel.
MAX_ROWS = 4096

_compile = torch.compile(
    dynamic=True,
    fullgraph=True,
    recompile_limit=64,
    # Or else a kernel that first meets a small tap is built for one thread, and stays so.
    options={"cpp.dynamic_threads": True},
)


def _activate(value: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(value)
    if activation == "relu6":
        return value.clamp(min=0, max=6)
    return value


@_compile
def _relu_moments(
    rows: Tensor, mean: Tensor, m2: Tensor, counts: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> None:
    value = rows
    if bias is not None:
        value = value + bias
    if residual is not None:
        value = value + residual
    y = _activate(value, activation)
    centred = y.to(mean.dtype) - mean
    sums, squares = centred.sum(dim=0), centred.square().sum(dim=0)
    rows.copy_(y)
    offset = sums / rows.shape[0]
    before, arriving = counts.unbind()
    share = arriving / (before + arriving)
    m2.add_(squares - sums * offset + offset.square() * (before * share))
    mean.add_(offset * share)


@_compile
def _relu_moments_backward(grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str) -> None:
    gradient = grad.to(a.dtype) + a + b * y.to(a.dtype)
    if activation == "relu":
        gradient = torch.where(y > 0, gradient, 0)
    elif activation == "relu6":
        gradient = torch.where((y > 0) & (y < 6), gradient, 0)
    grad.copy_(gradient)


def _direct(
    moment: Tensor, target: Tensor, scale: Tensor | None, state: list[Tensor], constants: tuple[Tensor, ...],
    fresh: Tensor, rule: str, advance: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One row (means or variances) of the averager: weighted direction, loss terms, difference, all [D]."""
    rate, decay1, decay2, eps, correction1, correction2 = constants
    difference = target - moment if scale is None else scale * (target - moment)
    if rule == "none":
        direction, loss = 2 * difference, difference.square()
    elif rule == "ma_moments":
        (v,) = state
        average = torch.where(fresh, moment, v + rate * (moment - v) if advance else v)
        if advance:
            v.copy_(average)
        remainder = target - average if scale is None else scale * (target - average)
        features = moment.shape[0]
        direction, loss = remainder * (2 * rate / features), remainder.square() / features
    else:
        direction = v = state[0]
        if rule == "ma" and advance:
            direction = v + rate * (difference - v)
        elif advance:
            _, m, u = state
            g = v - difference
            new_m = m + decay1 * (g - m)
            new_u = u + decay2 * (g * g - u)
            direction = v - rate * (new_m / correction1) / ((new_u / correction2).sqrt() + eps)
            m.copy_(new_m)
            u.copy_(new_u)
        if advance:
            v.copy_(direction)
        loss = direction * difference
    return direction if scale is None else scale * direction, loss, difference


@_compile
def _averager_step(
    mean: Tensor, m2: Tensor, target_mean: Tensor, target_variance: Tensor, state_mean: list[Tensor],
    state_variance: list[Tensor], weight: Tensor | None, scalars: Tensor, fresh: Tensor, rule: str, advance: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    count, dof, *constants = scalars.unbind()
    rates = tuple(constants)
    toward_mean, loss_mean, difference_mean = _direct(
        mean, target_mean, weight, state_mean, rates, fresh, rule, advance
    )
    squared_weight = None if weight is None else weight.square()
    toward_variance, loss_variance, difference_variance = _direct(
        m2 / dof, target_variance, squared_weight, state_variance, rates, fresh, rule, advance
    )
    b = toward_variance * (-2 / dof)
    a = -toward_mean / count - b * mean
    terms = (loss_mean, loss_variance, difference_mean.square(), difference_variance.square())
    return a, b, torch.stack([term.sum() for term in terms])


def _rows(x: Tensor) -> Tensor:
    """`feature_rows` without the view relation, whose base's shape would otherwise be guarded on."""
    return feature_rows(x).data


def _twice(rows: Tensor) -> Tensor:
    """The one image of `rows` [1, F] as two."""
    return rows.expand(2, -1).contiguous()


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
    rows, shortcut, row = _rows(x), None if residual is None else _rows(residual), _bias_row(bias, x)
    mean, m2 = mean.data, m2.data
    if count == 0:
        first = rows[0].to(mean.dtype)
        if row is not None:
            first += row
        if shortcut is not None:
            first += shortcut[0]
        mean.copy_(_activate(first, activation))
        m2.zero_()
    for start in range(0, len(rows), MAX_ROWS):
        part = rows[start : start + MAX_ROWS].data
        shortcut_part = None if shortcut is None else shortcut[start : start + MAX_ROWS].data
        counts = torch.tensor([count + start, len(part)], dtype=mean.dtype, device=mean.device)
        if len(part) > 1:
            _relu_moments(part, mean, m2, counts, row, shortcut_part, activation)
            continue
        pair = _twice(part)
        pair_shortcut = None if shortcut_part is None else _twice(shortcut_part)
        _relu_moments(pair, mean, m2, counts, row, pair_shortcut, activation)
        part.copy_(pair[:1])


@torch.no_grad()
def relu_moments_backward(grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str = "relu") -> None:
    """See `kernels.relu_moments_backward`."""
    rows, values = _rows(grad), _rows(y)
    if len(rows) > 1:
        _relu_moments_backward(rows, values, a.data, b.data, activation)
        return
    pair = _twice(rows)
    _relu_moments_backward(pair, _twice(values), a.data, b.data, activation)
    rows.copy_(pair[:1])


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
    # Bias corrections in float64: 1 − 0.999 in float32 is already off by 1.3e-5.
    corrections = torch.stack((1 - beta1**t, 1 - beta2**t)).to(mean.dtype)
    constants = mean.new_tensor([count, count - correction, rate, 1 - beta1, 1 - beta2, eps])
    states = {"ama": (v, m, u), "ma": (v,), "ma_moments": (v,), "none": ()}[rule]
    a, b, sums = _averager_step(
        mean, m2, target_mean, target_variance, [state[0] for state in states], [state[1] for state in states],
        weight, torch.cat((constants, corrections)), fresh, rule, advance,
    )  # fmt: skip
    return a, b, sums.double()


def works(dtype: torch.dtype) -> str | None:
    """None if torch.compile can build code here, else the reason in one line.

    The trial is the forward operation itself, so that what it compiles is not wasted.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on the PATH"
    try:
        buffers = torch.zeros(2, 32, dtype=accumulation_dtype(dtype))
        relu_moments(torch.zeros(4, 8, 2, 2, dtype=dtype), buffers[0], buffers[1], 0)
    except (torch._inductor.exc.InductorError, torch._dynamo.exc.TorchDynamoException) as error:
        return f"{compiler} cannot build Inductor's code ({str(error).strip().splitlines()[0]})"
    return None
