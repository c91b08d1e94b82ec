"""Rows of all ranks, with a gradient for those that are one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.training.ranks import Ranks


def everywhere(rows: Tensor, ranks: Ranks) -> Tensor:
    """`rows` [n, F] of every rank, one below the other in rank order: [N, F]. Alone, `rows` itself.

    Differentiable: the gradient of a rank's own rows is the sum, over ranks, of what each found for them. So with a
    loss L of all rows, computed by every one of W ranks, and backward from L / W on each, the gradients of shared
    weights add up to what one process has. It stays so if L has parts that a rank computes of its own images and of
    everybody's rows, and that go through `everywhere` as well.

    Shares may differ in size. Every rank has to come, to forward and to backward, in the same order. The gradient is
    not differentiable again.
    """
    return rows if ranks.size == 1 else _Everywhere.apply(rows, ranks)


class _Everywhere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        everybody, ctx.mine = ranks.gather(rows)
        ctx.ranks = ranks
        return everybody

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        ctx.ranks.sum_([total])
        return total[ctx.mine], None
