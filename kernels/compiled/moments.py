"""Activation and moments, their gradient, and the moments of a dataset, through torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import plain
from kernels._dynamo import MAX_ROWS, Kernel, vector_options
from kernels.layout import feature_rows, is_channels_last
from kernels.operators import operator

STREAMS = 16
"""Images that the streaming kernel reads side by side, each as one run of consecutive memory."""
STREAMED_FEATURES = 2**15
"""Features of a tap from which streaming pays; below, a tap's images fit the caches."""
STREAMED_IMAGES = 10_000
"""Images of a dataset from which streaming pays; below, compiling its kernel costs more than it saves."""


def activate(value: Tensor, activation: str) -> Tensor:
    """`activation(value)`, not in place."""
    if activation == "relu":
        return torch.relu(value)
    if activation == "relu6":
        return value.clamp(min=0, max=6)
    return value


@Kernel
def moments_kernel(
    rows: Tensor, mean: Tensor, m2: Tensor, before: Tensor, arriving: Tensor, bias: Tensor | None,
    residual: Tensor | None, activation: str,
) -> None:  # fmt: skip
    """rows [N, F] ← y in place, and its moments merged into mean and m2 [F]."""
    value = rows
    if bias is not None:
        value = value + bias
    if residual is not None:
        value = value + residual
    y = activate(value, activation)
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


@Kernel
def backward_kernel(grad: Tensor, y: Tensor, a: Tensor, b: Tensor, shortcut: Tensor | None, activation: str) -> None:
    """grad ← (grad + shortcut + a + b·y) · activation'(y), [N, F]."""
    gradient = grad.to(a.dtype)
    if shortcut is not None:
        gradient = gradient + shortcut
    gradient = gradient + a + b * y.to(a.dtype)
    if activation == "relu":
        gradient = torch.where(y > 0, gradient, 0)
    elif activation == "relu6":
        gradient = torch.where((y > 0) & (y < 6), gradient, 0)
    grad.copy_(gradient)


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
        moments_kernel(part.numel(), key, part, mean, m2, before, new, row, shortcut, activation)
        count += arriving
    if rows.shape[0] == 1:
        rows.copy_(parts[0][:1])


@operator("compiled")
@torch.no_grad()
def relu_moments_backward(
    grad: Tensor, y: Tensor, a: Tensor, b: Tensor, activation: str = "relu", shortcut: Tensor | None = None
) -> None:
    """See `kernels.relu_moments_backward`."""
    rows, key = feature_rows(grad), (y.dtype, activation, shortcut is None)
    parts = _slices(rows)
    shortcuts = (None,) * len(parts) if shortcut is None else _slices(feature_rows(shortcut))
    for part, values, around in zip(parts, _slices(feature_rows(y)), shortcuts, strict=True):
        backward_kernel(part.numel(), key, part, values, a, b, around, activation)
    if rows.shape[0] == 1:
        rows.copy_(parts[0][:1])


@operator("compiled")
@torch.no_grad()
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
    """See `kernels.dataset_moments`. Large taps of large datasets are streamed, others go to `relu_moments`.

    A loop over all images for each feature jumps by a whole image at every read, which neither the prefetcher nor the
    address cache of a CPU follows; `STREAMS` images side by side are as many plain streams.
    """
    streamed = images >= STREAMED_IMAGES and mean.numel() >= STREAMED_FEATURES and x.device.type == "cpu"
    if not streamed:
        relu_moments(x, mean, m2, count, bias, residual, activation)
        return
    if bias is not None or residual is not None:
        # First on its own: twice as many streams are no faster, and take Inductor minutes to compile.
        plain.activate_(x, bias, residual, activation)
        activation = "none"
    whole = len(x) // STREAMS * STREAMS if count else 0  # the kernel needs a running mean to centre on
    if whole:
        rows = feature_rows(x).data
        for start in range(0, whole, STREAMS):
            part = list(rows[start : start + STREAMS].unbind())
            _streaming_kernel()(part, mean.data, m2.data, mean.new_tensor(count + start), activation)
    if whole < len(x):
        relu_moments(x[whole:], mean, m2, count + whole, None, None, activation)


@functools.cache
def _streaming_kernel() -> Callable[..., None]:
    """`_merge_streams`, compiled at the first call (see `kernels._dynamo` on why not before)."""
    return torch.compile(
        _merge_streams, dynamic=True, fullgraph=True, options={"cpp.dynamic_threads": True, **vector_options()}
    )


def _merge_streams(rows: list[Tensor], mean: Tensor, m2: Tensor, count: Tensor, activation: str) -> None:
    values = [activate(value, activation) for value in rows]
    centred = values[0].to(torch.float64) - mean
    sums, squares = centred, centred * centred
    for value in values[1:]:
        centred = value.to(torch.float64) - mean
        sums, squares = sums + centred, squares + centred * centred
    if activation != "none":
        for row, value in zip(rows, values):
            row.copy_(value)
    offset = sums / len(rows)
    share = len(rows) / (count + len(rows))
    m2.add_(squares - sums * offset + offset.square() * (count * share))
    mean.add_(offset * share)
