"""Adam of a table, of which every step has gradients of some rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RowAdam(torch.optim.Optimizer):
    """Each row has an Adam of its own (Kingma & Ba 2015), which counts the steps that have a gradient for it:

        m ← β₁m + (1−β₁)g        v ← β₂v + (1−β₂)g²        w ← w − lr · m / (1−β₁ᵗ) / (√(v / (1−β₂ᵗ)) + ε)

    All other rows stay as they are: neither do old gradients move them on, as in Adam of the whole table, nor is a row
    that is rare taken for one with a long history. The host waits for nothing.

    Args:
        table: [M, K].
        lr: learning rate, a number or a tensor.
        betas, eps: β₁ and β₂, ε.
    """

    def __init__(
        self, table: Tensor, lr: float | Tensor, *, betas: tuple[float, float] = (0.5, 0.999), eps: float = 1e-8
    ):
        super().__init__([table], {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def take(self, rows: Tensor, gradient: Tensor, skip: Tensor) -> None:
        """One step of `rows`.

        Args:
            rows: their numbers [n], int64 on the table's device; one that is there twice has the sum of its gradients.
            gradient: [n, K].
            skip: [], above 0 if nothing is to change.
        """
        (group,) = self.param_groups
        (table,) = group["params"]
        state, (beta1, beta2) = self._state_of(table), group["betas"]
        same = (rows.unsqueeze(1) == rows).to(gradient.dtype)
        gradient = (same @ gradient.nan_to_num()).to(table.dtype)  # what is not finite is skipped
        steps = state["steps"][rows] + 1
        first = torch.lerp(gradient, state["exp_avg"][rows], beta1)
        second = torch.lerp(gradient.square(), state["exp_avg_sq"][rows], beta2)
        passed = steps.double().unsqueeze(1)
        unbiased = first / (1 - beta1**passed).to(table.dtype)
        root = (second / (1 - beta2**passed).to(table.dtype)).sqrt()
        moved = table[rows] - group["lr"] * unbiased / (root + group["eps"])
        for kept, new in (
            (state["steps"], steps),
            (state["exp_avg"], first),
            (state["exp_avg_sq"], second),
            (table, moved),
        ):
            # Of a row that is there twice both are the same.
            kept.index_copy_(0, rows, torch.where(skip > 0, kept[rows], new))

    def moved(self) -> Tensor:
        """Which rows have had a gradient so far, bool [M]."""
        (group,) = self.param_groups
        (table,) = group["params"]
        state = self.state.get(table)
        return state["steps"] > 0 if state else torch.zeros(len(table), dtype=torch.bool, device=table.device)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """A table's step is `take`."""
        raise NotImplementedError

    def _state_of(self, table: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[table]
        if not state:
            state["steps"] = torch.zeros(len(table), dtype=table.dtype, device=table.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        return state
