"""Values whose gradient is known in closed form, and whose second derivatives are not."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


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
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream.to(gradient.dtype) * gradient, None, None
