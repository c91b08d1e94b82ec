"""BatchNorm whose batch is the images of one process, or of all that share a minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_ALL_BUT_CHANNELS = (0, 2, 3)


class Summing(Protocol):
    """The processes that share a minibatch, as far as BatchNorm has to know them."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """In place, every tensor becomes its sum over all ranks."""
        ...


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm of a generator, whose batches `Generator.count_batch` counts.

    Attributes:
        ranks: the processes whose images are one batch; None for this one alone.
    """

    ranks: Summing | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], in training by the batch's statistics, which the running ones follow; otherwise by those."""
        if not self.training:
            return super().forward(x)
        if self.ranks is not None:
            return _RankBatchNorm.apply(
                x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps, self.ranks
            )
        y, _, _ = torch.native_batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, True, self.momentum or 0.0, self.eps
        )
        return y


class _CountedBatchNorm(BatchNorm2d):
    """BatchNorm over all ranks, in a network that no generator counts the batches of."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], see `BatchNorm2d`."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return super().forward(x)


def share_batches(module: nn.Module, ranks: Summing) -> None:
    """From now on the batches of every BatchNorm below `module` are those of all `ranks`.

    PyTorch's own `BatchNorm2d` is replaced; parameters, buffers and their names stay.
    """
    for child in list(module.modules()):
        if isinstance(child, BatchNorm2d):
            child.ranks = ranks
            continue
        for name, norm in list(child.named_children()):
            if type(norm) is nn.BatchNorm2d:
                setattr(child, name, _counted(norm, ranks))


def _counted(norm: nn.BatchNorm2d, ranks: Summing) -> BatchNorm2d:
    counted = _CountedBatchNorm(norm.num_features, norm.eps, norm.momentum).train(norm.training)
    for name, parameter in norm.named_parameters():
        setattr(counted, name, parameter)
    for name, buffer in norm.named_buffers():
        setattr(counted, name, buffer)
    counted.ranks = ranks
    return counted


class _RankBatchNorm(torch.autograd.Function):
    """BatchNorm in training over the images of all ranks, as one process would compute it:

        y = w · x̂ + b,  x̂ = (x − mean)/√(var + ε)
        ∂L/∂x = w/√(var + ε) · (g − (Σ g + x̂ Σ g·x̂)/n)        with sums and n over N, H, W of all ranks

    The gradients of w and b are this rank's share, which the step sums like those of all weights.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
        eps: float, ranks: Summing,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(x.dtype, torch.float32)
        values = x.to(wide)
        count = torch.full((1,), values.numel() // values.shape[1], dtype=torch.float64, device=x.device)
        sums = torch.cat((values.sum(dim=_ALL_BUT_CHANNELS).double(), count))
        ranks.sum_([sums])
        total = sums[-1]
        mean = (sums[:-1] / total).to(wide)
        centred = values - mean.view(1, -1, 1, 1)
        m2 = centred.square().sum(dim=_ALL_BUT_CHANNELS)
        ranks.sum_([m2])
        running_mean.lerp_(mean, momentum)
        running_var.lerp_((m2 / (total - 1)).to(wide), momentum)
        scale = ((m2 / total).to(wide) + eps).rsqrt()
        normalised = centred * scale.view(1, -1, 1, 1)
        ctx.save_for_backward(normalised, scale, weight, total)
        ctx.ranks = ranks
        return (normalised * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalised, scale, weight, total = ctx.saved_tensors
        g = grad.to(normalised.dtype)
        of_bias, of_weight = g.sum(dim=_ALL_BUT_CHANNELS), (g * normalised).sum(dim=_ALL_BUT_CHANNELS)
        sums = torch.stack((of_bias, of_weight))
        ctx.ranks.sum_([sums])
        of_all, with_x = (sums / total).to(g.dtype).view(2, 1, -1, 1, 1)
        of_x = (weight * scale).view(1, -1, 1, 1) * (g - of_all - normalised * with_x)
        return of_x.to(grad.dtype), of_weight, of_bias, None, None, None, None, None
