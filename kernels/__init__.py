"""The fused operations of the engine, and the one place that chooses who computes them.

Every backend is a module with the same seven operations under the names and signatures that this one documents:

| operation | what it does |
| --- | --- |
| `relu_moments` | activation in place, and the moments of its output |
| `relu_moments_backward` | the gradient of both |
| `averager_step` | difference → averager's step → loss → coefficients of the gradient |
| `dataset_moments` | `relu_moments` over a whole dataset, in float64 |
| `watch` | counts steps, and keeps the first whose loss was not finite |
| `pairwise_sums` | Σ_j k(x_i, y_j) and its gradient, without the matrix of all pairs |
| `nearest` | the nearest row of y for every row of x, without that matrix |

`reference` is plain PyTorch (the oracle), `compiled` goes through torch.compile (CPU), `triton` runs on CUDA, or on a
CPU inside Triton's interpreter. The functions here choose by the tensors' device and dtype, as `select("auto", …)`
does; who calls them again and again calls `select` once.

`averager_step` fuses what the paper writes one after the other: `difference`, `direction` (the averager's step),
`matching_loss` and `coefficients`. Under these names the pieces stand in every backend's `averaging.py`; those of this
module are the reference's, plain PyTorch for any device, for averagers that have no fused kernel.

All tensors of one call are on one device. Per-feature buffers are contiguous and float32 for float16, bfloat16 and
float32 activations, float64 for float64. ValueError names the argument that is not as it should be. The operations
are PyTorch operators (see `kernels.operators`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import subprocess
from collections.abc import Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from kernels import compiled, reference
from kernels.reference import coefficients, difference, direction, matching_loss, totals

__all__ = [
    "BACKENDS",
    "averager_step",
    "coefficients",
    "dataset_moments",
    "difference",
    "direction",
    "matching_loss",
    "nearest",
    "pairwise_sums",
    "relu_moments",
    "relu_moments_backward",
    "select",
    "totals",
    "watch",
]

BACKENDS = ("auto", "reference", "compiled", "triton")
log = logging.getLogger("gfmn")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        return _why_triton_fails(device) if torch.cuda.is_available() else None
    if device.type == "cpu" and importlib.import_module("triton").knobs.runtime.interpret:
        interpreted = importlib.import_module("kernels.triton").INTERPRETED
        return None if interpreted else "TRITON_INTERPRET=1 was set after Triton had been imported"
    return f"Triton needs a CUDA device, not {device.type} (on a CPU its interpreter will do: set TRITON_INTERPRET=1)"


@functools.cache
def _why_triton_fails(device: torch.device) -> str | None:
    """Tried once a device: Triton builds its launcher with a C compiler, which slim containers lack."""
    x, moments = torch.zeros(16, 4, 4, 4, device=device), torch.zeros(2, 64, device=device)
    own = importlib.import_module("triton.errors").TritonError  # as where its assembler does not know the GPU
    try:
        importlib.import_module("kernels.triton").relu_moments(x, *moments, 0)
    except (RuntimeError, OSError, subprocess.CalledProcessError, own) as error:
        return " ".join(str(error).split())[:200]
    return None


@functools.cache
def _why_not_compiled(device_type: str, dtype: torch.dtype) -> str | None:
    return compiled.works(dtype) if device_type == "cpu" else f"it is for CPUs, not {device_type}"


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
        return compiled if chosen == "compiled" else importlib.import_module("kernels.triton")
    if name != "auto":
        raise ValueError(f"kernels: the {chosen} backend cannot run here: {reason}")
    _warn_once(f"the {chosen} kernels cannot run here: {reason}; using the plain PyTorch ones, which are slower")
    return reference


def relu_moments(
    x: Tensor,
    mean: Tensor,
    m2: Tensor,
    count: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> None:
    """In place, `x ← activation(x + bias + residual)`, and its N images join the moments of `count` images before.

    With `count = 0` the buffers are overwritten and need no initial value:

        mean_d = 1/N Σ_n x_nd      m2_d = Σ_n (x_nd − mean_d)²      (Chan et al. 1979 for count > 0)

    Args:
        x: [N, C, H, W], a convolution's output, dense in contiguous or channels_last order.
        mean, m2: [F], F = C·H·W, in the memory order of x; they may be float64 for activations of any dtype.
        count: images merged before.
        bias: [C].
        residual: a shortcut, laid out as x.
        activation: "relu", "relu6" or "none".
    """
    select("auto", x.device, x.dtype).relu_moments(x, mean, m2, count, bias, residual, activation)


def relu_moments_backward(
    grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str = "relu", shortcut: Tensor | None = None
) -> None:
    """In place, `grad ← (grad + shortcut + a + b·y) · activation'(y)`: the gradient with respect to the input of
    `relu_moments`.

    The derivative is y > 0 for "relu", 0 < y < 6 for "relu6" and 1 for "none" (docs/method.md, identity 1).

    Args:
        grad: [N, C, H, W], the gradient with respect to y that came from later layers, laid out as y.
        y: what `relu_moments` left in x; only read.
        a, b: [F], from `averager_step`, in the memory order of y.
        activation: as in `relu_moments`.
        shortcut: the gradient that came around the next layers, laid out as y; only read.
    """
    select("auto", y.device, y.dtype).relu_moments_backward(grad, y, a, b, activation, shortcut)


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
    """One pass over all D features: `difference`, `direction`, `matching_loss` and `coefficients` in one.

    Args:
        mean, m2: [D], moments of the minibatch's `count` images.
        target_mean, target_variance: [D].
        v, m, u: [2, D], the averager's state, changed in place when `advance`; only what the rule keeps is looked at.
        step: 0-d int64, steps taken before; counted up when `advance`.
        rule: of `kernels.rules.RULES`: "ama", "ama_uncorrected", "ma", "ma_moments" or "none".
        rate: α, AMA's learning rate or the moving average's share of the new value.
        beta1, beta2, eps: AMA's.
        correction: c of the variance m2/(N − c).
        advance: whether the averager takes a step. Without, AMA and "ma" use the v that is there, and "ma_moments"
            the average that would come next.
        weight: w [D]; the averager sees w·Δ^μ and w²·Δ^σ, and a and b carry w·v^μ and w²·v^σ.

    Returns:
        a, b [D], coefficients of the gradient; and [6] float64, the loss over means and over variances, Σ(Δ^μ)² and
        Σ(Δ^σ)², the loss and ‖Δ‖².
    """
    backend = select("auto", mean.device, mean.dtype)
    result = backend.averager_step(
        mean, m2, count, target_mean, target_variance, v, m, u, step, rule=rule, rate=rate, beta1=beta1, beta2=beta2,
        eps=eps, correction=correction, advance=advance, weight=weight,
    )  # fmt: skip
    return cast("tuple[Tensor, Tensor, Tensor]", result)


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
    """`relu_moments` for batches of a whole dataset: activations of any dtype, all sums in float64.

    Args:
        x, count, bias, residual, activation: as in `relu_moments`.
        mean, m2: [F] float64.
        images: that are expected in all, which decides what is worth compiling, and changes no more than rounding.
    """
    select("auto", x.device, x.dtype).dataset_moments(x, mean, m2, count, bias, residual, activation, images)


def watch(loss: Tensor, step: Tensor, first_bad: Tensor) -> None:
    """Count a training step, and remember the first whose loss was NaN or infinite; the host need not wait.

    In place, `step ← step + 1`, then `first_bad ← min(first_bad, step)` unless the loss is finite.

    Args:
        loss: 0-d, of any floating dtype; only read.
        step: 0-d int64, steps counted before.
        first_bad: 0-d int64, a number larger than all steps as long as there was none.
    """
    select("auto", loss.device, loss.dtype).watch(loss, step, first_bad)


def pairwise_sums(
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    parameters: Sequence[float] = (),
    diagonal: bool = True,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """For every row x_i, the sum of a kernel over all rows y_j, and its gradient with respect to x_i, y fixed:

        S_i = Σ_j k(x_i, y_j)          G_i = Σ_j ∂/∂x_i k(x_i, y_j)

    | `kernel` | k(x, y) | `parameters` |
    | --- | --- | --- |
    | "gaussian" | Σ_σ exp(−‖x−y‖²/(2σ²)) | all σ |
    | "rational-quadratic" | Σ_α (1 + ‖x−y‖²/(2α))^−α | all α |
    | "imq" | Σ_c c/(c + ‖x−y‖²) | all c |
    | "energy" | −‖x−y‖, with gradient 0 where the distance is 0 | none |
    | "linear" | x·y | none |
    | "polynomial" | (x·y/F + 1)^degree | the degree |

    With f(t) of t = ‖x−y‖² or t = x·y, the gradient is 2 Σ_j f'(t_ij) (x_i − y_j) or Σ_j f'(t_ij) y_j. Both results
    come from one pass over the pairs, a tile at a time (`reference` holds the whole matrix). Squared distances are
    ‖x−c‖² + ‖y−c‖² − 2 (x−c)·(y−c), c the mean of all rows, negative ones 0. For the energy kernel those below their
    own rounding error are 0: (8 + √F) · eps · (‖x−c‖² + ‖y−c‖²). The same bits at every call. There is no second
    derivative.

    Args:
        x: [n, F] of any floating dtype and any strides.
        y: [m, F], of x's dtype; None for x itself, whose distances to itself are exactly 0. The total Σ_ij k(x_i, x_j)
            has the gradient 2 G then, since k is symmetric.
        kernel, parameters: of `kernels.profiles.PROFILES`; at most 8 parameters.
        diagonal: without y, whether the pairs (i, i) count.
        gradient: whether G is wanted.

    Returns:
        S [n] float64, of tiles that are summed in the dtype of G; and G [n, F], or [0, F] if it isn't wanted, float32
        for float16, bfloat16 and float32 features, float64 for float64.
    """
    backend = select("auto", x.device, x.dtype)
    result = backend.pairwise_sums(x, y, kernel, parameters, diagonal, gradient)
    return cast("tuple[Tensor, Tensor]", result)


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For every row x_i, the row y_j with the smallest ‖x_i − y_j‖², all rows compared, a tile of them at a time.

    Compared are squared distances as `pairwise_sums` has them, so rows that are equally near but for rounding may be
    taken for each other; of equal ones the first is taken.

    Args:
        x: [n, F] of any floating dtype and any strides.
        y: [m, F], of x's dtype.

    Returns:
        Their indices [n] int64, and squared distances [n], computed again from the differences; float32 for float16,
        bfloat16 and float32 features, float64 for float64.
    """
    result = select("auto", x.device, x.dtype).nearest(x, y)
    return cast("tuple[Tensor, Tensor]", result)
