"""The averager's step, the loss and the coefficients of its gradient, through torch.compile.

The averager sees means and variances as separate rows, which Inductor turns into one loop over all D features; as one
[2, D] tensor they become four. The pieces are those of `kernels.reference.averaging`, row by row; inside
`step_kernel` they are one loop. (Not shared with the reference, which is the oracle for them.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import plain
from kernels._dynamo import Kernel
from kernels.operators import operator
from kernels.rules import RULES, Form


def difference(moment: Tensor, target: Tensor, scale: Tensor | None) -> Tensor:
    """One row of Δ, [D]; `scale` is w for means and w² for variances."""
    return target - moment if scale is None else scale * (target - moment)


def average_moments(moment: Tensor, v: Tensor, fresh: Tensor, rate: Tensor, advance: bool) -> Tensor:
    """One row of the moving average of moments, [D]; `fresh` tells the first step."""
    average = torch.where(fresh, moment, v + rate * (moment - v))
    if advance:
        v.copy_(average)
    return average


def direction(
    rule: str, difference: Tensor, state: list[Tensor], constants: tuple[Tensor, ...], advance: bool
) -> Tensor:
    """One row of v after the averager's step (section 2.2; see `kernels.direction`), [D]."""
    rate, decay1, decay2, eps, correction1, correction2 = constants
    if rule == "none":
        return 2 * difference
    if rule == "ma_moments":
        return difference * (2 * rate / difference.shape[0])
    direction = v = state[0]
    if rule == "ma" and advance:
        direction = v + rate * (difference - v)
    elif advance:
        if rule == "ama_uncorrected":  # ε beside the biased √u is ε/√(1−β2^t) beside the corrected one
            eps = eps / correction2.sqrt()
        _, m, u = state
        g = v - difference
        new_m = m + decay1 * (g - m)
        new_u = u + decay2 * (g * g - u)
        direction = v - rate * (new_m / correction1) / ((new_u / correction2).sqrt() + eps)
        m.copy_(new_m)
        u.copy_(new_u)
    if advance:
        v.copy_(direction)
    return direction


def matching_loss(v: Tensor, difference: Tensor, form: Form) -> Tensor:
    """One row of the loss's terms (section 2.2, or equation 1 for "squares"; see `kernels.matching_loss`), [D]."""
    if form == "direction":
        return v * difference
    squares = difference.square()
    return squares if form == "squares" else squares / difference.shape[0]


def coefficients(v_mean: Tensor, v_variance: Tensor, mean: Tensor, count: Tensor, dof: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of ∂L/∂x = a + b·x, [D] each, with `dof` = N − c (docs/method.md, identity 1)."""
    b = v_variance * (-2 / dof)
    a = -v_mean / count - b * mean
    return a, b


@Kernel
def step_kernel(
    mean: Tensor, m2: Tensor, target_mean: Tensor, target_variance: Tensor, state_mean: list[Tensor],
    state_variance: list[Tensor], weight: Tensor | None, scalars: list[Tensor], fresh: Tensor, rule: str, advance: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(a, b) [D] and the four sums of `kernels.averager_step`."""
    count, dof, *rest = scalars
    constants = tuple(rest)
    directions, losses, differences = [], [], []
    rows = (
        (mean, target_mean, weight, state_mean),
        (m2 / dof, target_variance, None if weight is None else weight.square(), state_variance),
    )
    for moment, target, scale, state in rows:
        compared = delta = difference(moment, target, scale)
        if rule == "ma_moments":
            compared = difference(average_moments(moment, state[0], fresh, constants[0], advance), target, scale)
        v = direction(rule, compared, state, constants, advance)
        directions.append(v if scale is None else scale * v)
        losses.append(matching_loss(v, compared, RULES[rule].loss))
        differences.append(delta.square())
    a, b = coefficients(directions[0], directions[1], mean, count, dof)
    return a, b, torch.stack([term.sum() for term in (*losses, *differences)])


@operator("compiled")
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
    if advance and RULES[rule].counts:
        step += 1
    t = step.double()
    # Bias corrections in float64: 1 − 0.999 in float32 is already off by 1.3e-5.
    corrections = torch.stack((1 - beta1**t, 1 - beta2**t)).to(mean.dtype)
    constants = mean.new_tensor([count, count - correction, rate, 1 - beta1, 1 - beta2, eps])
    own = {"v": v, "m": m, "u": u}
    states = [own[name] for name in RULES[rule].state]
    a, b, sums = step_kernel(
        mean.numel(), (mean.dtype, rule, advance, weight is None), mean, m2, target_mean, target_variance,
        [state[0] for state in states], [state[1] for state in states], weight,
        [*constants.unbind(), *corrections.unbind()], fresh, rule, advance,
    )  # fmt: skip
    return a, b, plain.with_totals(sums.double())
