"""The three fused operations of moment matching, and the one place that chooses who computes them.

A backend is a module with three functions of the same names and signatures:

`relu_moments(x, mean, m2, count, bias=None, residual=None, activation="relu")`
    In place, `x ← activation(x + bias + residual)` for a convolution's output x [N, C, H, W] (dense, contiguous or
    channels_last); then merges the N new images into the moments of the `count` images seen before. With
    `mean, m2` [F] in the memory order of x and `count = 0`, the buffers are overwritten and need no initial value:

        mean_d = 1/N Σ_n x_nd      m2_d = Σ_n (x_nd − mean_d)²      (Chan et al. 1979 for count > 0)

`relu_moments_backward(grad, y, a, b, activation="relu")`
    In place, `grad ← (grad + a + b·y) · mask`, where y is what `relu_moments` left behind, `grad` [N, C, H, W] the
    gradient with respect to y that came from later layers, and the mask is activation'(y): y > 0 for "relu",
    0 < y < 6 for "relu6", 1 for "none". The result is the gradient with respect to x (DESIGN's identity 1).

`averager_step(mean, m2, count, target_mean, target_variance, v, m, u, step, *, rule, rate, beta1, beta2, eps,
correction, advance, weight=None) -> (a, b, sums)`
    One pass over all D features: difference Δ = target − batch, the averager's new direction v (`rule` "ama", "ma",
    "ma_moments" or "none"; state v, m, u [2, D] and the 0-d int64 `step` change in place, only when `advance`), the
    coefficients a, b [D] of the gradient, and sums [4] = (loss over means, loss over variances, Σ(Δ^μ)², Σ(Δ^σ)²).
    Without `advance`, "ama" and "ma" use the v that is there, and "ma_moments" the average that would come next.
    With `weight` w [D] the averager sees w·Δ^μ and w²·Δ^σ, and a and b carry w·v^μ and w²·v^σ.

All tensors of one call are on one device. Per-feature buffers are contiguous and float32 for float16, bfloat16 and
float32 activations, float64 for float64; `mean` and `m2` of `relu_moments` may be float64 for all of them. ValueError
names the argument that is not as it should be. The functions are PyTorch operators (see `kernels.operators`).

`reference` is plain PyTorch (the oracle), `compiled` goes through torch.compile (CPU), `triton` runs on CUDA, or on a
CPU inside Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch

from kernels import compiled, reference

BACKENDS = ("auto", "reference", "compiled", "triton")
log = logging.getLogger("gfmn")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and importlib.import_module("triton").knobs.runtime.interpret:
        interpreted = importlib.import_module("kernels.triton_ops").INTERPRETED
        return None if interpreted else "TRITON_INTERPRET=1 was set after Triton had been imported"
    return f"Triton needs a CUDA device, not {device.type} (on a CPU its interpreter will do: set TRITON_INTERPRET=1)"


@functools.cache
def _why_not_compiled(device_type: str, dtype: torch.dtype) -> str | None:
    return compiled.works(dtype) if device_type == "cpu" else None


def select(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend module for activations of `dtype` on `device`.

    "auto" is Triton on CUDA, `compiled` on a CPU, and `reference` wherever those cannot run (said once, in a warning).
    Raises ValueError for an unknown name, or for a backend that cannot run here.
    """
    if name not in BACKENDS:
        raise ValueError(f"kernels: {name!r} is not one of {', '.join(BACKENDS)}")
    chosen = {"cuda": "triton", "cpu": "compiled"}.get(device.type, "reference") if name == "auto" else name
    if chosen == "reference":
        return reference
    reason = _why_not_triton(device) if chosen == "triton" else _why_not_compiled(device.type, dtype)
    if reason is None:
        return compiled if chosen == "compiled" else importlib.import_module("kernels.triton_ops")
    if name != "auto":
        raise ValueError(f"kernels: the {chosen} backend cannot run here: {reason}")
    _warn_once(f"the {chosen} kernels cannot run here: {reason}; using the plain PyTorch ones, which are slower")
    return reference
