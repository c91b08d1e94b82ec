"""The three operations through torch.compile: fused, vectorised, threaded loops on a CPU.

The same maths as `reference`, arranged for Inductor:

- Sums around a pilot value (the running mean, or the first image before there is one) give mean and centred second
  moment in one pass, without the cancellation of raw sums. Which of the two is chosen by a scalar, so that merging
  into earlier moments and starting afresh are one kernel.
- The averager sees means and variances as separate rows, which Inductor turns into one loop over all D features; as
  one [2, D] tensor they become four.
- Sizes are dynamic, so neither another minibatch nor another tap compiles anything again. What still would is kept
  away from the kernels: a single image (size 1 is special to PyTorch) is doubled, and more than `MAX_ROWS` images
  (where Inductor changes its way to sum) are merged slice by slice.
- Small work has a kernel of its own without threads. Waking them costs more than they bring, and milliseconds where
  other processes want the cores; and left to itself Inductor would decide by the size that happens to come first.

One kernel per dtype, activation and presence of bias and shortcut; Inductor's own cache keeps them between runs.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from kernels.layout import accumulation_dtype, feature_rows, is_channels_last
from kernels.operators import operator

# Inductor sums more than 4096 terms with a compensating helper, which is another kernel; and float32 sums of fewer
# terms are better merged than continued.
MAX_ROWS = 1024
# Elements from which threads pay: the grain of PyTorch's own parallel loops.
GRAIN = 32768


class _Kernel:
    """A function compiled once per `variant`: for one thread (fewer than `GRAIN` elements) and for as many as there
    are when it runs, per dtypes, and per what is given and what isn't.

    torch.compile's own look at every argument of every call costs more than small taps do, the more so as the caches
    then hold a convolution's data and not Python's. It keeps to sizes here; the rest is the key of the variant.

    Nothing of torch.compile is imported before the first call: it takes seconds, and it imports Triton, whose
    interpreter has to be chosen before that.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.variants: dict[Any, Callable[..., Any]] = {}

    def __call__(self, elements: int, key: Any, *args: Any) -> Any:
        """The function of `args`; `key` tells apart what must not share a variant, other than sizes."""
        key = (elements < GRAIN, args[0].shape[-1] == 1, key)  # sizes of 1 are special to torch.compile
        compiled = self.variants.get(key)
        if compiled is None:
            compiled = self.variants[key] = self._compile(serial=key[0])
            args = torch.utils._pytree.tree_map_only(Tensor, _as_example, args)
        return compiled(*args)

    def _compile(self, serial: bool) -> Callable[..., Any]:
        # PyTorch keeps what it compiled by code object, and must not take one variant for another.
        code = self.function.__code__.replace(co_name=f"{self.function.__name__}_{len(self.variants)}")
        threads = {"cpp.threads": 1} if serial else {"cpp.dynamic_threads": True}
        return torch.compile(  # type: ignore[call-overload]  # its stub lacks recompile_limit
            types.FunctionType(code, self.function.__globals__),
            dynamic=True,
            fullgraph=True,
            recompile_limit=64,
            options={**threads, "guard_filter_fn": _keep_sizes},
        )


def _keep_sizes(guards: Sequence[Any]) -> list[bool]:
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


def _activate(value: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(value)
    if activation == "relu6":
        return value.clamp(min=0, max=6)
    return value


@_Kernel
def _relu_moments(
    rows: Tensor, mean: Tensor, m2: Tensor, before: Tensor, arriving: Tensor, bias: Tensor | None,
    residual: Tensor | None, activation: str,
) -> None:  # fmt: skip
    value = rows
    if bias is not None:
        value = value + bias
    if residual is not None:
        value = value + residual
    y = _activate(value, activation)
    fresh = before == 0
    # A view by strides has memory of its own in Inductor: the pilot is read in the loop over images, not worked out.
    pilot = torch.where(fresh, y[0].to(mean.dtype), mean).as_strided(mean.shape, (1,))
    centred = y.to(mean.dtype) - pilot
    sums, squares = centred.sum(dim=0), centred.square().sum(dim=0)
    if activation != "none" or bias is not None or residual is not None:
        rows.copy_(y)
    offset = sums / rows.shape[0]
    share = arriving / (before + arriving)
    m2.copy_(torch.where(fresh, 0, m2) + squares - sums * offset + offset.square() * (before * share))
    mean.copy_(pilot + offset * share)


@_Kernel
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
        average = torch.where(fresh, moment, v + rate * (moment - v))
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


@_Kernel
def _averager_step(
    mean: Tensor, m2: Tensor, target_mean: Tensor, target_variance: Tensor, state_mean: list[Tensor],
    state_variance: list[Tensor], weight: Tensor | None, scalars: list[Tensor], fresh: Tensor, rule: str, advance: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    count, dof, *constants = scalars
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


@functools.cache
def _dynamo() -> types.ModuleType:
    return importlib.import_module("torch._dynamo")


def _as_example(x: Tensor) -> Tensor:
    """The same memory for torch.compile to look at: a tensor of its own, no view into a buffer at some offset."""
    if not x.dim():
        return x
    x = from_dlpack(to_dlpack(x.data))
    if x.dim() == 2:
        # By itself "dynamic" would still tie the number of images to another size that is equal to it by chance.
        _dynamo().mark_dynamic(x, 0, min=2, max=MAX_ROWS)
    return x


@functools.lru_cache(maxsize=256)
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A number that no kernel is compiled for, and that none changes."""
    return torch.tensor(value, dtype=dtype)


def _slices(rows: Tensor) -> Sequence[Tensor]:
    """`rows` [N, F] in as few and as equal parts of 2 to `MAX_ROWS` images as there can be; a single image twice."""
    count = rows.shape[0]
    if count == 1:
        return (rows.expand(2, -1).contiguous(),)
    return (rows,) if count <= MAX_ROWS else rows.tensor_split(-(-count // MAX_ROWS))


def _bias_row(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """`bias` [C] repeated over positions into one row [F] in the memory order of `x`."""
    if bias is None:
        return None
    _, channels, height, width = x.shape
    if is_channels_last(x):
        return bias.repeat(height * width)
    return bias.view(channels, 1).expand(channels, height * width).reshape(-1)


@operator("compiled")
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
    rows, row = feature_rows(x), _bias_row(bias, x)
    parts = _slices(rows)
    shortcuts = (None,) * len(parts) if residual is None else _slices(feature_rows(residual))
    key = (x.dtype, mean.dtype, activation, bias is None, residual is None)
    for part, shortcut in zip(parts, shortcuts, strict=True):
        # One image counts as one, although its kernel sees it twice.
        arriving = min(part.shape[0], rows.shape[0])
        before, new = _scalar(count, mean.dtype), _scalar(arriving, mean.dtype)
        _relu_moments(part.numel(), key, part, mean, m2, before, new, row, shortcut, activation)
        count += arriving
    if rows.shape[0] == 1:
        rows.copy_(parts[0][:1])


@operator("compiled")
@torch.no_grad()
def relu_moments_backward(grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str = "relu") -> None:
    """See `kernels.relu_moments_backward`."""
    rows, key = feature_rows(grad), (y.dtype, activation)
    parts = _slices(rows)
    for part, values in zip(parts, _slices(feature_rows(y)), strict=True):
        _relu_moments_backward(part.numel(), key, part, values, a, b, activation)
    if rows.shape[0] == 1:
        rows.copy_(parts[0][:1])


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
    if advance and rule != "none":
        step += 1
    t = step.double()
    # Bias corrections in float64: 1 − 0.999 in float32 is already off by 1.3e-5.
    corrections = torch.stack((1 - beta1**t, 1 - beta2**t)).to(mean.dtype)
    constants = mean.new_tensor([count, count - correction, rate, 1 - beta1, 1 - beta2, eps])
    states = {"ama": (v, m, u), "ma": (v,), "ma_moments": (v,), "none": ()}[rule]
    a, b, sums = _averager_step(
        mean.numel(), (mean.dtype, rule, advance, weight is None), mean, m2, target_mean, target_variance,
        [state[0] for state in states], [state[1] for state in states], weight,
        [*constants.unbind(), *corrections.unbind()], fresh, rule, advance,
    )  # fmt: skip
    return a, b, sums.double()


def works(dtype: torch.dtype) -> str | None:
    """None if torch.compile can build code here, else the reason in one line.

    The trial is the forward operation itself, so that what it compiles is not wasted.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on the PATH"
    failures = (importlib.import_module("torch._inductor.exc").InductorError, _dynamo().exc.TorchDynamoException)
    try:
        mean = torch.zeros(GRAIN // 16, dtype=accumulation_dtype(dtype))
        relu_moments(torch.zeros(16, GRAIN // 16, 1, 1, dtype=dtype), mean, mean.clone(), 0)
    except failures as error:
        return f"{compiler} cannot build Inductor's code ({str(error).strip().splitlines()[0]})"
    return None
