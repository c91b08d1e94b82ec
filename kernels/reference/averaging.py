"""The paper by name: the averager's step, the loss, and the coefficients of its gradient, in plain PyTorch.

`averager_step` composes them. All vectors are float32, or float64 throughout; D is the number of features, and [2, D]
has the means in row 0 and the variances in row 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import plain
from kernels.operators import operator
from kernels.rules import RULES, Form


def difference(moments: Tensor, target: Tensor, scale: Tensor | None = None) -> Tensor:
    """Δ = target − batch, [2, D], times `scale` [2, D] if there is one: w for means and w² for variances."""
    delta = target - moments
    return delta if scale is None else scale * delta


def average_moments(moments: Tensor, v: Tensor, step: Tensor, *, rate: float, advance: bool) -> Tensor:
    """M ← (1−α) M + α (m, s), [2, D], from the first batch's moments on: the moving average of the authors' code.

    M is kept in `v`, and changes only when `advance`; otherwise the average that would come next is returned.
    """
    average = torch.where(step == 0, moments, torch.lerp(v, moments, rate))
    if advance:
        v.copy_(average)
    return average


def direction(
    rule: str,
    difference: Tensor,
    v: Tensor,
    m: Tensor,
    u: Tensor,
    step: Tensor,
    *,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    advance: bool,
) -> Tensor:
    """The averager's step: the direction v [2, D] that a minibatch's difference Δ [2, D] leads to.

    "ama" (section 2.2, ADAM moving average) is Adam on ½‖v − Δ‖², whose gradient is g:

        g = v − Δ        m ← β1 m + (1−β1) g        u ← β2 u + (1−β2) g²
        v ← v − α · (m/(1−β1^t)) / (√(u/(1−β2^t)) + ε)

    "ama_uncorrected" is the Adam of PyTorch 0.3, which adds ε to √u before the bias of u is corrected:

        v ← v − α · √(1−β2^t) / (1−β1^t) · m / (√u + ε)

    "ma" (section 2.2, moving average) is v ← (1−α) v + α Δ. "none" is 2Δ, the derivative of equation 1. "ma_moments"
    is 2α/D·Δ, where Δ already compares the average of `average_moments` with the target.

    Only when `advance`, the state `v`, `m`, `u` [2, D] changes in place and the 0-d int64 `step` counts; otherwise
    those of AMA and "ma" return the v that is there. The result may share v's memory.
    """
    if advance and RULES[rule].counts:
        step += 1
    if rule == "none":
        return 2 * difference
    if rule == "ma_moments":
        return difference * (2 * rate / difference.shape[1])
    if rule == "ma" and advance:
        v.lerp_(difference, rate)
    if rule.startswith("ama") and advance:
        g = v - difference
        m.lerp_(g, 1 - beta1)
        u.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        t = step.double()
        correction1, correction2 = (1 - beta1**t).to(m.dtype), (1 - beta2**t).to(u.dtype)
        if rule == "ama_uncorrected":
            v -= rate * correction2.sqrt() / correction1 * m / (u.sqrt() + eps)
        else:
            v -= rate * (m / correction1) / ((u / correction2).sqrt() + eps)
    return v


def matching_loss(v: Tensor, difference: Tensor, form: Form = "direction") -> Tensor:
    """The terms [2, D] of the loss; L is their sum.

    "direction" (section 2.2): L = Σ v·Δ with v detached, what matching along an average minimises.
    "squares" (equation 1): L = ‖Δ‖².
    "mean squares" (the authors' code): L = ‖Δ‖²/D for means and for variances.
    """
    if form == "direction":
        return v * difference
    squares = difference.square()
    return squares if form == "squares" else squares / difference.shape[1]


def coefficients(v: Tensor, mean: Tensor, count: int, correction: int) -> tuple[Tensor, Tensor]:
    """(a, b) [D] each of the loss's gradient with respect to feature d of image n, ∂L/∂x_nd = a_d + b_d·x_nd.

    With v^μ and v^σ the rows of v [2, D], N = `count` and c = `correction` (docs/method.md, identity 1):

        b_d = −2 v^σ_d/(N−c)        a_d = −v^μ_d/N − b_d m_d
    """
    b = v[1] * (-2 / (count - correction))
    a = -v[0] / count - b * mean
    return a, b


def totals(loss: Tensor, difference: Tensor) -> Tensor:
    """[6] float64, from the terms of the loss and Δ, [2, D] each: the loss over means and over variances, Σ(Δ^μ)² and
    Σ(Δ^σ)², the loss and ‖Δ‖²."""
    return plain.with_totals(torch.cat((loss.double().sum(dim=1), difference.double().square().sum(dim=1))))


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
    scale = None if weight is None else torch.stack((weight, weight.square()))
    compared = delta = difference(moments, target, scale)
    if rule == "ma_moments":
        average = average_moments(moments, v, step, rate=rate, advance=advance)
        compared = difference(average, target, scale)
    toward = direction(rule, compared, v, m, u, step, rate=rate, beta1=beta1, beta2=beta2, eps=eps, advance=advance)
    loss = matching_loss(toward, compared, RULES[rule].loss)
    a, b = coefficients(toward if scale is None else scale * toward, mean, count, correction)
    return a, b, totals(loss, delta)
