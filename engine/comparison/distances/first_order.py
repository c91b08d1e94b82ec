"""Values whose gradient is known in closed form, and whose second derivatives are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def with_gradient(argument: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """`value` [] as a function of `argument`, whose derivative is `gradient`, of the argument's shape.

    For functions that autograd differentiates badly, or at needless cost, where a formula has the gradient. Only once:
    a second derivative raises RuntimeError, where one that took the gradient for a constant would be wrong in silence.
    """
    found: Tensor = _WithGradient.apply(argument, value.detach(), gradient.detach())
    return found


class _WithGradient(Function):
    """See `with_gradient`."""

    @staticmethod
    def forward(ctx: Any, argument: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(argument, gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        argument, gradient = ctx.saved_tensors
        found = upstream.to(gradient.dtype) * gradient
        return _Last.apply(found, argument) if torch.is_grad_enabled() else found, None, None


class _Last(Function):
    """A gradient that depends on `argument` in a way that isn't known."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, argument: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None]:
        raise RuntimeError("this distance can be differentiated only once")
