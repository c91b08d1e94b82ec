"""Frozen convolutions of maps of a few pixels, on a CPU: one product of matrices for every pixel.

oneDNN's convolutions are made for large maps. Where only a few pixels q come out, each of them is a product of its own,

    y[n, :, q] = Σ_p W[:, :, tap(p, q)] · x[n, :, p]   =   [N, P·C] × [P·C, C'],   P pixels p under the kernel,

and so is the gradient of every pixel that goes in, `∂L/∂x[n, :, p] = Σ_q W[:, :, tap(p, q)]ᵀ · ∂L/∂y[n, :, q]`. Taps of
the kernel that lie on the padding take no part. A kernel of 1×1 is a single product for all pixels.

The weights of one product are gathered from the convolution's own when they are needed. Keeping the gathered ones saves
little more time, and they are more than the weights themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

MOST_PIXELS_IN, MOST_PIXELS_OUT = 16, 4
LEAST_WORK = 2**18
"""N·C·C' from which on a product is worth more than its call costs, and four times that for each pixel of the larger
map where there are several products (measured, two threads)."""

# Name and numbers of an activation that oneDNN applies to a product.
Epilogue = tuple[str, list[float]]


def pays(conv: nn.Conv2d, shape: Sequence[int]) -> bool:
    """Whether products are faster than oneDNN's convolution of an input [N, C, H, W]: a matter of shapes alone."""
    count, channels, height, width = shape
    if height * width > MOST_PIXELS_IN or conv.groups != 1 or conv.dilation != (1, 1):
        return False
    work = count * channels * conv.out_channels
    if _is_pointwise(conv):
        return work * height * width >= LEAST_WORK
    rows, columns = (_seen(*axis) for axis in _axes(conv, height, width))
    pixels = len(rows) * len(columns)
    if not 0 < pixels <= MOST_PIXELS_OUT or not all(taps.start < taps.stop for _, taps in (*rows, *columns)):
        return False
    most = max(pixels, height * width)
    return work >= (LEAST_WORK if most == 1 else 4 * LEAST_WORK * most)


def convolve(conv: nn.Conv2d, x: Tensor, epilogue: Epilogue) -> Tensor:
    """The convolution of `x` [N, C, H, W] and its activation, [N, C', H', W'] channels_last."""
    inputs, weight = x.permute(0, 2, 3, 1), conv.weight.permute(0, 2, 3, 1)
    if _is_pointwise(conv):
        product = _product(inputs.flatten(0, 2), weight.flatten(1), conv.bias, epilogue)
        return product.view(*inputs.shape[:3], conv.out_channels).permute(0, 3, 1, 2)
    rows, columns = (_seen(*axis) for axis in _axes(conv, x.shape[2], x.shape[3]))
    y = _empty_map(x, (len(x), conv.out_channels, len(rows), len(columns)))
    outputs = y.permute(0, 2, 3, 1)
    for i, (above, row_taps) in enumerate(rows):
        for j, (beside, column_taps) in enumerate(columns):
            seen = inputs[:, above, beside].flatten(1)
            outputs[:, i, j] = _product(seen, _gathered(weight, row_taps, column_taps), conv.bias, epilogue)
    return y


def input_gradient(conv: nn.Conv2d, grad: Tensor, shape: Sequence[int]) -> Tensor:
    """∂L/∂x [`shape`], channels_last, of the convolution alone, from ∂L/∂(its result)."""
    given, weight = grad.permute(0, 2, 3, 1), conv.weight.permute(2, 3, 0, 1)
    if _is_pointwise(conv):
        product = _product(given.flatten(0, 2), weight[0, 0].t())
        return product.view(*given.shape[:3], conv.in_channels).permute(0, 3, 1, 2)
    rows, columns = (_seeing(*axis) for axis in _axes(conv, shape[2], shape[3]))
    gradient = _empty_map(grad, shape)
    wanted = gradient.permute(0, 2, 3, 1)
    for i, (above, row_taps) in enumerate(rows):
        for j, (beside, column_taps) in enumerate(columns):
            if row_taps and column_taps:
                seeing = given[:, above, beside].flatten(1)
                wanted[:, i, j] = _product(seeing, _gathered_back(weight, row_taps, column_taps))
            else:
                wanted[:, i, j] = 0  # a stride that passes over this pixel
    return gradient


def _gathered(weight: Tensor, rows: slice, columns: slice) -> Tensor:
    """[C', taps·C] of `weight` [C', rows, columns, C]. oneDNN's products are slow where rows of a matrix lie apart."""
    return weight[:, rows, columns].flatten(1).contiguous()


def _gathered_back(weight: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """[C, taps·C'] of `weight` [rows, columns, C', C]."""
    return torch.cat([weight[row, column] for row in rows for column in columns]).t()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: Epilogue = ("none", [])) -> Tensor:
    """The epilogue of `x · weightᵀ + bias`. oneDNN's in float32 too, where PyTorch's own may be half as fast."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *epilogue, "")


def _empty_map(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)


def _axes(conv: nn.Conv2d, height: int, width: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """(size, kernel, stride, padding) of rows and of columns."""
    (kernel, padding, stride) = (conv.kernel_size, conv.padding, conv.stride)
    assert not isinstance(padding, str)
    return (height, kernel[0], stride[0], padding[0]), (width, kernel[1], stride[1], padding[1])


@functools.cache
def _seen(size: int, kernel: int, stride: int, padding: int) -> tuple[tuple[slice, slice], ...]:
    """For every output coordinate of one axis, the input coordinates under the kernel, and the taps above them."""
    found = []
    for q in range((size + 2 * padding - kernel) // stride + 1):
        first = q * stride - padding
        taps = slice(max(0, -first), min(kernel, size - first))
        found.append((slice(first + taps.start, first + taps.stop), taps))
    return tuple(found)


@functools.cache
def _seeing(size: int, kernel: int, stride: int, padding: int) -> tuple[tuple[slice, list[int]], ...]:
    """For every input coordinate of one axis, the output coordinates made of it, and by which tap each."""
    found = []
    for p in range(size):
        taps = {q: p - (q * stride - padding) for q in range((size + 2 * padding - kernel) // stride + 1)}
        met = [q for q, tap in taps.items() if 0 <= tap < kernel]
        found.append((slice(met[0], met[-1] + 1) if met else slice(0), [taps[q] for q in met]))
    return tuple(found)
