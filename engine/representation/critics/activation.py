"""ReLU and LeakyReLU for networks that are differentiated twice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rectified(x: Tensor, slope: float = 0.0) -> Tensor:
    """x where it is positive, slope · x elsewhere; differentiable twice.

    The second derivative is 0. PyTorch's own functions have zeros for it, which go back through the whole network: two
    more convolutions for each one of a critic with a gradient penalty. Here nothing goes back.
    """
    return _Rectified.apply(x, slope)


class Rectified(nn.Module):
    """`rectified` as a layer."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return rectified(x, self.slope)


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        y = F.leaky_relu(x, slope) if slope else F.relu(x)
        ctx.save_for_backward(y)
        ctx.slope = slope
        ctx.set_materialize_grads(False)  # nothing that goes back stays nothing
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        (y,) = ctx.saved_tensors
        return _Masked.apply(grad, y.detach(), ctx.slope), None


class _Masked(torch.autograd.Function):
    """g where y is positive, slope · g elsewhere. y is a constant."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, y: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(y)
        ctx.slope = slope
        ctx.set_materialize_grads(False)
        if slope:
            return torch.ops.aten.leaky_relu_backward(grad, y, slope, True)
        return torch.ops.aten.threshold_backward(grad, y, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        (y,) = ctx.saved_tensors
        return _Masked.apply(grad, y, ctx.slope), None, None
