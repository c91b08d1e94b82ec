"""Averagers: from the noisy difference Δ of one minibatch to the matching direction v.

Every averager is a rule of `kernels.averager_step` plus its rates; the state lives here, as tensors `[2, D]` whose
row 0 is for means and row 1 for variances, in the feature order of whoever calls `step`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

VARIANTS = ("paper", "authors")


@dataclass
class BatchMoments:
    """Moments of one minibatch as the kernels accumulate them: `[D]` float32 (float64 for float64 features)."""

    count: int
    mean: Tensor
    m2: Tensor


@dataclass
class TargetMoments:
    """What an averager needs of the target, in the kernels' dtype and feature order: `[D]` each."""

    mean: Tensor
    variance: Tensor


@dataclass
class Direction:
    """What one averager step hands on.

    Attributes:
        a, b: `[D]`, the coefficients of ∂L/∂x_nd = a_d + b_d x_nd (DESIGN, identity 1).
        sums: `[4]`, on the device: loss over means, loss over variances, ‖Δ^μ‖², ‖Δ^σ‖².
    """

    a: Tensor
    b: Tensor
    sums: Tensor


class Averager:
    """Base of the averagers: a rule, its rates, and its state.

    `v`, `m` and `u` are `[2, D]` or empty, `steps` is a 0-d int64 tensor. They exist after `reset`.
    """

    rule: str
    state_names: tuple[str, ...] = ()
    rate = 0.0
    beta1 = 0.0
    beta2 = 0.0

    def __init__(self) -> None:
        self.v = self.m = self.u = torch.empty(2, 0)
        self.steps = torch.zeros((), dtype=torch.int64)

    def reset(
        self, num_features: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        """State before the first step, for D = `num_features`, in the public feature order."""
        for name in ("v", "m", "u"):
            size = num_features if name in self.state_names else 0
            setattr(self, name, torch.zeros(2, size, dtype=dtype, device=device))
        self.steps = torch.zeros((), dtype=torch.int64, device=device)

    def eps_for(self, num_features: int) -> float:
        """ε of the Adam step, in units of Δ."""
        return 0.0

    def step(
        self,
        kernels: ModuleType,
        batch: BatchMoments,
        target: TargetMoments,
        *,
        correction: int,
        advance: bool = True,
        weight: Tensor | None = None,
    ) -> Direction:
        """Take one step on the difference of `batch` and `target` (only read the state if not `advance`)."""
        a, b, sums = kernels.averager_step(
            batch.mean,
            batch.m2,
            batch.count,
            target.mean,
            target.variance,
            self.v,
            self.m,
            self.u,
            self.steps,
            rule=self.rule,
            rate=self.rate,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps_for(batch.mean.numel()),
            correction=correction,
            advance=advance,
            weight=weight,
        )
        return Direction(a, b, sums)


class AMA(Averager):
    """ADAM moving average (paper, section 2.2): Adam on ½‖v − Δ‖² gives the direction, L = Σ v·Δ with v detached.

        g = v − Δ        m ← β1 m + (1−β1) g        u ← β2 u + (1−β2) g²
        v ← v − α · (m/(1−β1^t)) / (√(u/(1−β2^t)) + ε)

    Args:
        lr: α.
        beta1: None means 0.9 for the paper's variant and 0.5 for the authors' code.
        beta2, eps: Adam's.
        variant: "paper" sums the inner loss over features and starts at v = 0; "authors" is the authors' code: the
            inner loss is a mean, whose gradients scaled by 2/D act as ε·D/2, and v starts uniform in ±1/√D.
        seed: of that start; used by the authors' variant only.
    """

    rule = "ama"
    state_names = ("v", "m", "u")

    def __init__(
        self,
        lr: float = 1e-5,
        beta1: float | None = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
        variant: str = "paper",
        seed: int = 0,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant: {variant!r} is not one of {', '.join(VARIANTS)}")
        if not lr > 0:
            raise ValueError(f"lr: must be positive, got {lr}")
        if beta1 is None:
            beta1 = 0.9 if variant == "paper" else 0.5
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: must be in [0, 1), got {value}")
        if not eps >= 0:
            raise ValueError(f"eps: must not be negative, got {eps}")
        self.rate, self.beta1, self.beta2, self.eps = lr, beta1, beta2, eps
        self.variant, self.seed = variant, seed

    def reset(
        self, num_features: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        """As for every averager, with the authors' random v."""
        super().reset(num_features, dtype=dtype, device=device)
        if self.variant == "authors":
            generator = torch.Generator().manual_seed(self.seed)
            uniform = torch.rand(2, num_features, dtype=torch.float64, generator=generator) * 2 - 1
            self.v.copy_(uniform / math.sqrt(num_features))

    def eps_for(self, num_features: int) -> float:
        """ε, or what the authors' mean over features makes of it."""
        return self.eps * num_features / 2 if self.variant == "authors" else self.eps


class MovingAverage(Averager):
    """Moving average (paper, section 2.2, the baseline of Figure 4).

    Args:
        alpha: α in (0, 1]; None means 0.1 for the paper's variant and 1 for the authors' code.
        variant: "paper" averages the differences, v ← (1−α) v + α Δ from v = 0, L = Σ v·Δ with v detached; "authors"
            averages the batch's moments, M ← (1−α) M + α (m, s) from the first batch's, and L is the mean squared
            difference of M to the target, so that its gradient carries 2α/D.
    """

    state_names = ("v",)

    def __init__(self, alpha: float | None = None, variant: str = "paper"):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant: {variant!r} is not one of {', '.join(VARIANTS)}")
        if alpha is None:
            alpha = 0.1 if variant == "paper" else 1.0
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha: must be in (0, 1], got {alpha}")
        self.rule = "ma" if variant == "paper" else "ma_moments"
        self.rate, self.variant = alpha, variant


class NoAverage(Averager):
    """No averaging (paper, equation 1): L = Σ Δ², so v = 2Δ. Stateless."""

    rule = "none"
