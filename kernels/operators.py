"""The operations as PyTorch operators, `torch.ops.gfmn.<operation>.<backend>`.

`operator` registers one backend's function and returns it as a call of the operator. One schema serves every backend,
so that what is mutated and what is returned is known to FakeTensorMode, torch.compile and `torch.library.opcheck`
without looking inside. The operators check their arguments; the functions behind them don't. They have no autograd
formula: an autograd.Function of the engine owns the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.layout import accumulation_dtype, is_channels_last
from kernels.profiles import check_profile
from kernels.rules import RULES

ACTIVATIONS = ("relu", "relu6", "none")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
F = TypeVar("F", bound=Callable[..., Any])
_SCHEMAS = {
    "relu_moments": (
        "(Tensor(a!) x, Tensor(b!) mean, Tensor(c!) m2, SymInt count, Tensor? bias=None, Tensor? residual=None, "
        "str activation='relu') -> ()"
    ),
    "relu_moments_backward": (
        "(Tensor(a!) grad, Tensor y, Tensor a, Tensor b, str activation='relu', Tensor? shortcut=None) -> ()"
    ),
    "dataset_moments": (
        "(Tensor(a!) x, Tensor(b!) mean, Tensor(c!) m2, SymInt count, Tensor? bias=None, Tensor? residual=None, "
        "str activation='relu', SymInt images=0) -> ()"
    ),
    "averager_step": (
        "(Tensor mean, Tensor m2, SymInt count, Tensor target_mean, Tensor target_variance, Tensor(a!) v, Tensor(b!) m,"
        " Tensor(c!) u, Tensor(d!) step, *, str rule, float rate, float beta1, float beta2, float eps, int correction,"
        " bool advance, Tensor? weight=None) -> (Tensor, Tensor, Tensor)"
    ),
    "watch": "(Tensor loss, Tensor(a!) step, Tensor(b!) first_bad) -> ()",
    "pairwise_sums": (
        "(Tensor x, Tensor? y, str kernel, float[] parameters=[], bool diagonal=True, bool gradient=True)"
        " -> (Tensor, Tensor)"
    ),
    "nearest": "(Tensor x, Tensor y) -> (Tensor, Tensor)",
}


def _check(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(value.shape) != shape or value.dtype != dtype or value.device != device:
        raise ValueError(
            f"{name}: expected {list(shape)} {dtype} on {device}, "
            f"got {list(value.shape)} {value.dtype} on {value.device}"
        )


def _check_buffer(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    _check(name, value, shape, dtype, device)
    if not value.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, got strides {value.stride()}")


def _check_activations(name: str, x: Tensor, activation: str) -> tuple[int]:
    """(F,), the shape of per-feature buffers for `x` [N, C, H, W]."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 4 or x.shape[0] < 1 or x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected [N ≥ 1, C, H, W] of a floating dtype, got {list(x.shape)} {x.dtype}")
    if not is_channels_last(x) and not x.is_contiguous():
        raise ValueError(f"{name}: must be contiguous or channels_last, got strides {x.stride()} for {list(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad, but the operators have no autograd formula; use them under no_grad")
    _, channels, height, width = x.shape
    return (channels * height * width,)


def _check_alike(name: str, value: Tensor, x: Tensor) -> None:
    _check(name, value, tuple(x.shape), x.dtype, x.device)
    same = value.is_contiguous(memory_format=torch.channels_last) if is_channels_last(x) else value.is_contiguous()
    if not same:
        raise ValueError(f"{name}: must lie in memory as the activations do, got strides {value.stride()}")


def _check_relu_moments(
    x: Tensor,
    mean: Tensor,
    m2: Tensor,
    count: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> None:
    shape = _check_activations("x", x, activation)
    # A whole dataset's moments are merged in float64 whatever the activations' dtype.
    wide = mean.dtype == torch.float64
    _check_buffer("mean", mean, shape, torch.float64 if wide else accumulation_dtype(x.dtype), x.device)
    _check_buffer("m2", m2, shape, mean.dtype, x.device)
    if count < 0:
        raise ValueError(f"count: must not be negative, got {count}")
    if bias is not None:
        _check_buffer("bias", bias, (x.shape[1],), x.dtype, x.device)
    if residual is not None:
        _check_alike("residual", residual, x)


def _check_relu_moments_backward(
    grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str = "relu", shortcut: Tensor | None = None
) -> None:
    shape = _check_activations("grad", grad, activation)
    _check_alike("y", y, grad)
    if shortcut is not None:
        _check_alike("shortcut", shortcut, grad)
    _check_buffer("a", a, shape, accumulation_dtype(y.dtype), y.device)
    _check_buffer("b", b, shape, a.dtype, y.device)


def _check_dataset_moments(
    x: Tensor,
    mean: Tensor,
    m2: Tensor,
    count: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    images: int = 0,
) -> None:
    if mean.dtype != torch.float64:
        raise ValueError(f"mean: expected float64, got {mean.dtype}")
    _check_relu_moments(x, mean, m2, count, bias, residual, activation)


def _check_averager_step(
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
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule: {rule!r} is not one of {', '.join(RULES)}")
    if mean.dim() != 1 or mean.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"mean: expected [D] float32 or float64, got {list(mean.shape)} {mean.dtype}")
    if count <= correction:
        raise ValueError(f"count: variance with correction {correction} needs more than {count} images")
    shape = tuple(mean.shape)
    buffers = {"mean": mean, "m2": m2, "target_mean": target_mean, "target_variance": target_variance, "weight": weight}
    for name, buffer in buffers.items():
        if buffer is not None:
            _check_buffer(name, buffer, shape, mean.dtype, mean.device)
    for name, state in (("v", v), ("m", m), ("u", u)):
        if name in RULES[rule].state:
            _check_buffer(name, state, (2, *shape), mean.dtype, mean.device)
    _check("step", step, (), torch.int64, mean.device)


def _fake_averager_step(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_averager_step(*args, **kwargs)
    mean: Tensor = args[0]
    return torch.empty_like(mean), torch.empty_like(mean), mean.new_empty(6, dtype=torch.float64)


def _check_watch(loss: Tensor, step: Tensor, first_bad: Tensor) -> None:
    if loss.dim() != 0 or loss.dtype not in DTYPES:
        raise ValueError(f"loss: expected [] of a floating dtype, got {list(loss.shape)} {loss.dtype}")
    _check("step", step, (), torch.int64, loss.device)
    _check("first_bad", first_bad, (), torch.int64, loss.device)


def _check_rows(name: str, x: Tensor) -> None:
    if x.dim() != 2 or 0 in x.shape or x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected [n ≥ 1, F ≥ 1] of a floating dtype, got {list(x.shape)} {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad, but the operators have no autograd formula; use them under no_grad")


def _check_pairwise_sums(
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    parameters: Sequence[float] = (),
    diagonal: bool = True,
    gradient: bool = True,
) -> None:
    _check_rows("x", x)
    if y is not None:
        _check_rows("y", y)
        _check("y", y, (y.shape[0], x.shape[1]), x.dtype, x.device)
    check_profile(kernel, parameters)
    if y is not None and not diagonal:
        raise ValueError("diagonal: can only be left out where there is no y")


def _fake_pairwise_sums(
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    parameters: Sequence[float] = (),
    diagonal: bool = True,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    _check_pairwise_sums(x, y, kernel, parameters, diagonal, gradient)
    rows, features = x.shape
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(rows, dtype=torch.float64), x.new_empty(rows if gradient else 0, features, dtype=dtype)


def _check_nearest(x: Tensor, y: Tensor) -> None:
    _check_rows("x", x)
    _check_rows("y", y)
    _check("y", y, (y.shape[0], x.shape[1]), x.dtype, x.device)


def _fake_nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    _check_nearest(x, y)
    rows = x.shape[0]
    return x.new_empty(rows, dtype=torch.int64), x.new_empty(rows, dtype=accumulation_dtype(x.dtype))


_OPERATIONS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "relu_moments": (_check_relu_moments, _check_relu_moments),
    "relu_moments_backward": (_check_relu_moments_backward, _check_relu_moments_backward),
    "dataset_moments": (_check_dataset_moments, _check_dataset_moments),
    "averager_step": (_check_averager_step, _fake_averager_step),
    "watch": (_check_watch, _check_watch),
    "pairwise_sums": (_check_pairwise_sums, _fake_pairwise_sums),
    "nearest": (_check_nearest, _fake_nearest),
}
# Operators live as long as this object.
_library: Any = torch.library.Library("gfmn", "DEF")  # type: ignore[no-untyped-call]


def operator(backend: str) -> Callable[[F], F]:
    """Decorator: the function, named as one of the operations, becomes `torch.ops.gfmn.<its name>.<backend>`."""

    def register(function: F) -> F:
        operation = function.__name__
        check, fake = _OPERATIONS[operation]

        def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return function(*args, **kwargs)

        name = f"{operation}.{backend}"
        _library.define(name + _SCHEMAS[operation], tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, checked, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gfmn::{name}", fake, lib=_library)
        overload = getattr(getattr(torch.ops.gfmn, operation), backend)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return overload(*args, **kwargs)

        return call  # type: ignore[return-value]

    return register
