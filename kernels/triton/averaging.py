"""The averager's step, the loss and the coefficients of its gradient, in Triton.

The pieces are those of `kernels.reference.averaging`, for `BLOCK` features of one row (means or variances), as device
functions that `averager_step_kernel` composes. A program owns `BLOCK_D` features and leaves its share of the loss in a
scratch buffer, which one program of a second kernel adds up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.operators import operator
from kernels.rules import RULES
from kernels.triton import launching
from kernels.triton.launching import RUNTIME_SIZES

# Features of a program.
BLOCK_D = 1024


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64 by squaring, for an int64 exponent ≥ 0 on the device."""
    result = tl.full([], 1.0, tl.float64)
    square = result * base
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * square, result)
        square = square * square
        exponent = exponent // 2
    return result


@triton.jit
def difference(moment, target, scale):
    """One row of Δ; `scale` is w for means and w² for variances."""
    return scale * (target - moment)


@triton.jit
def average_moments(moment, v_ptr, inside, fresh, rate, ADVANCE: tl.constexpr):
    """One row of the moving average of moments, kept in v; `fresh` tells the first step."""
    average = tl.load(v_ptr, mask=inside, other=0.0)
    average += rate * (moment - average)
    average = tl.where(fresh, moment, average)
    if ADVANCE:
        tl.store(v_ptr, average, mask=inside)
    return average


@triton.jit
def direction(
    difference, features, inside, v_ptr, m_ptr, u_ptr, rate, decay1, decay2, eps, correction1, correction2,
    RULE: tl.constexpr, ADVANCE: tl.constexpr,
):  # fmt: skip
    """One row of v after the averager's step (section 2.2; see `kernels.direction`); pointers are this block's."""
    if RULE == "none":
        v = 2 * difference
    elif RULE == "ma_moments":
        v = difference * (2 * rate / features)
    else:
        v = tl.load(v_ptr, mask=inside, other=0.0)
        if RULE == "ma" and ADVANCE:
            v += rate * (difference - v)
            tl.store(v_ptr, v, mask=inside)
        if RULE != "ma" and ADVANCE:
            if RULE == "ama_uncorrected":  # ε beside the biased √u is ε/√(1−β2^t) beside the corrected one
                eps = eps / tl.sqrt(correction2)
            g = v - difference
            m = tl.load(m_ptr, mask=inside, other=0.0)
            u = tl.load(u_ptr, mask=inside, other=0.0)
            m += decay1 * (g - m)
            u += decay2 * (g * g - u)
            v -= rate * (m / correction1) / (tl.sqrt(u / correction2) + eps)
            tl.store(m_ptr, m, mask=inside)
            tl.store(u_ptr, u, mask=inside)
            tl.store(v_ptr, v, mask=inside)
    return v


@triton.jit
def matching_loss(v, difference, features, FORM: tl.constexpr):
    """One row of the loss's terms (section 2.2, or equation 1 for "squares"; see `kernels.matching_loss`)."""
    if FORM == "direction":
        loss = v * difference
    else:
        loss = difference * difference
        if FORM == "mean squares":
            loss = loss / features
    return loss


@triton.jit
def coefficients(share, v_variance, mean, dof):
    """(a, b) of ∂L/∂x = a + b·x, with `share` = −v^μ/N and `dof` = N − c (docs/method.md, identity 1)."""
    b = v_variance * (-2.0 / dof)
    return share - b * mean, b


@triton.jit
def _row(
    moment, target, scale, at, features, inside, v_ptr, m_ptr, u_ptr, fresh,
    rate, decay1, decay2, eps, correction1, correction2,
    RULE: tl.constexpr, FORM: tl.constexpr, ADVANCE: tl.constexpr,
):  # fmt: skip
    """Means or variances: returns (weighted v, terms of the loss, Δ) of a block whose state lies `at` an offset."""
    delta = difference(moment, target, scale)
    compared = delta
    if RULE == "ma_moments":
        compared = difference(average_moments(moment, v_ptr + at, inside, fresh, rate, ADVANCE), target, scale)
    v = direction(
        compared, features, inside, v_ptr + at, m_ptr + at, u_ptr + at,
        rate, decay1, decay2, eps, correction1, correction2, RULE, ADVANCE,
    )  # fmt: skip
    return scale * v, matching_loss(v, compared, features, FORM), delta


@triton.jit
def _scalar(value, dtype: tl.constexpr):
    """A host's float argument as a float64 scalar, then `dtype` (the interpreter passes plain Python floats)."""
    return (tl.full([], 0.0, tl.float64) + value).to(dtype)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def averager_step_kernel(
    mean_ptr,  # [features] float32 (or float64, then everything below is)
    m2_ptr,  # [features]
    target_mean_ptr,  # [features]
    target_variance_ptr,  # [features]
    weight_ptr,  # [features] or None
    v_ptr,  # [2, features], changed in place when ADVANCE; row 0 for means, row 1 for variances; None for "none"
    m_ptr,  # [2, features], as v; only AMA has it
    u_ptr,  # [2, features], as m
    step_ptr,  # [] int64, steps taken before this one; only read here
    a_ptr,  # [features], out
    b_ptr,  # [features], out
    partial_ptr,  # [4, programs] float64, out: this program's share of `sums`
    features,
    count,
    dof,
    programs,
    rate: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    RULE: tl.constexpr,
    FORM: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Δ, the rule's new direction v, the coefficients a and b, and partial sums of the loss, for BLOCK features."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    program = tl.program_id(0)
    feature = program * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    images = count.to(dtype)
    freedom = dof.to(dtype)
    step = tl.load(step_ptr)
    # 1 − β^t in float64: in float32, 1 − 0.999 is already off by 1.3e-5.
    correction1 = (1.0 - _power(beta1, step + 1)).to(dtype)
    correction2 = (1.0 - _power(beta2, step + 1)).to(dtype)
    decay1 = _scalar(1.0 - beta1, dtype)
    decay2 = _scalar(1.0 - beta2, dtype)
    alpha = _scalar(rate, dtype)
    epsilon = _scalar(eps, dtype)
    fresh = step == 0

    scale = tl.full([BLOCK], 1.0, dtype)
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + feature, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + feature, mask=inside, other=0.0)
    target = tl.load(target_mean_ptr + feature, mask=inside, other=0.0)
    v_mean, loss_mean, difference_mean = _row(
        mean, target, scale, feature, features, inside, v_ptr, m_ptr, u_ptr, fresh,
        alpha, decay1, decay2, epsilon, correction1, correction2, RULE, FORM, ADVANCE,
    )  # fmt: skip
    # Divided here: to keep v until the end costs registers, and sm_80 spilled.
    share = -v_mean / images
    variance = tl.load(m2_ptr + feature, mask=inside, other=0.0) / freedom
    target = tl.load(target_variance_ptr + feature, mask=inside, other=0.0)
    scale = scale * scale
    v_variance, loss_variance, difference_variance = _row(
        variance, target, scale, tl.cast(features, tl.int64) + feature, features, inside, v_ptr, m_ptr, u_ptr, fresh,
        alpha, decay1, decay2, epsilon, correction1, correction2, RULE, FORM, ADVANCE,
    )  # fmt: skip
    a, b = coefficients(share, v_variance, mean, freedom)
    tl.store(b_ptr + feature, b, mask=inside)
    tl.store(a_ptr + feature, a, mask=inside)

    partial = partial_ptr + program
    _store_sum(partial, loss_mean, inside)
    _store_sum(partial + programs, loss_variance, inside)
    _store_sum(partial + 2 * programs, difference_mean * difference_mean, inside)
    _store_sum(partial + 3 * programs, difference_variance * difference_variance, inside)


@triton.jit
def _store_sum(pointer, terms, inside):
    # Lanes beyond the last feature hold the rule applied to zeros, which ε = 0 makes NaN.
    tl.store(pointer, tl.sum(tl.where(inside, terms, 0.0).to(tl.float64), axis=0))


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def sum_partials_kernel(
    partial_ptr,  # [4, programs] float64
    sums_ptr,  # [6] float64, out: the four sums, and those of their two halves
    step_ptr,  # [] int64, counted up when ADVANCE, after every program of the first stage has read it
    programs,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second stage of the loss: one program adds the partial sums in order."""
    for half in tl.static_range(2):
        both = tl.full([], 0.0, tl.float64)
        for term in tl.static_range(2 * half, 2 * half + 2):
            total = tl.zeros([BLOCK], tl.float64)
            for start in range(0, programs, BLOCK):
                index = start + tl.arange(0, BLOCK)
                total += tl.load(partial_ptr + term * programs + index, mask=index < programs, other=0.0)
            value = tl.sum(total, axis=0)
            tl.store(sums_ptr + term, value)
            both += value
        tl.store(sums_ptr + 4 + half, both)
    if ADVANCE:
        tl.store(step_ptr, tl.load(step_ptr) + 1)


@operator("triton")
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
    features = mean.numel()
    programs = triton.cdiv(features, BLOCK_D)
    a, b = torch.empty_like(mean), torch.empty_like(mean)
    partial = mean.new_empty(4, programs, dtype=torch.float64)
    sums = mean.new_empty(6, dtype=torch.float64)
    launching.launch(
        averager_step_kernel, mean.device, (programs,),
        mean, m2, target_mean, target_variance, weight, v, m, u, step, a, b, partial,
        features, count, count - correction, programs, rate, beta1, beta2, eps,
        RULE=rule, FORM=RULES[rule].loss, ADVANCE=advance, BLOCK=BLOCK_D,
    )  # fmt: skip
    launching.launch(
        sum_partials_kernel, mean.device, (1,),
        partial, sums, step, programs, ADVANCE=advance and RULES[rule].counts, BLOCK=BLOCK_D,
    )  # fmt: skip
    return a, b, sums
