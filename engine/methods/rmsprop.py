"""RMSprop that can be told to skip a step on the device, as torch's fused optimizers can."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RMSprop(torch.optim.Optimizer):
    """v ← αv + (1−α)g², w ← w − lr · g / (√v + ε), as in `torch.optim.RMSprop`.

    With an attribute `found_inf` above 0 ([], set for one step, as the loss scaling sets it) nothing changes, and the
    host need not know.

    Args:
        parameters: of one dtype, on one device.
        lr: learning rate, a number or a tensor.
        alpha, eps: α and ε; torch's own by default.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self, parameters: Iterable[Tensor], lr: float | Tensor = 1e-2, *, alpha: float = 0.99, eps: float = 1e-8
    ):
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients that there are; those of a step that is skipped become 0."""
        assert closure is None
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients, squares = [weight.grad for weight in weights], [self._square(weight) for weight in weights]
            kept = torch.full((), group["alpha"], dtype=weights[0].dtype, device=weights[0].device)
            if skip is not None:
                bad = skip > 0
                kept.masked_fill_(bad, 1.0)
                for gradient in gradients:
                    gradient.masked_fill_(bad, 0.0)
            torch._foreach_mul_(squares, kept)
            torch._foreach_addcmul_(squares, gradients, gradients, value=1 - group["alpha"])
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, group["eps"])
            changes = torch._foreach_div(gradients, roots)
            torch._foreach_mul_(changes, group["lr"])
            torch._foreach_sub_(weights, changes)

    def _square(self, weight: Tensor) -> Tensor:
        """v of `weight`, zero before its first step."""
        state = self.state[weight]
        if "square_avg" not in state:
            state["square_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        square: Tensor = state["square_avg"]
        return square
