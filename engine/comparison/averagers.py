"""Averagers: from the noisy difference Δ of one minibatch to the matching direction v.

To add one, derive it from `PlainAverager` and enter it in `AVERAGERS`; no other file has to know. It then runs with
every backend. The built-in ones are rules of `kernels.averager_step`, which all backends compute in one pass.

State is kept in tensors `[2, D]` whose row 0 is for means and row 1 for variances, in the feature order of whoever
calls `step`. Nothing here imports PyTorch before it is used, so that a command can list `AVERAGERS` at no cost.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from engine.support.errors import InputError

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import Tensor

VARIANTS = ("paper", "authors")
AMA_VARIANTS = (*VARIANTS, "authors-0.3")


@dataclass
class BatchMoments:
    """Moments of one minibatch as the kernels accumulate them: `[D]` float32 (float64 for float64 features)."""

    count: int
    mean: Tensor
    m2: Tensor

    def merge(self, other: BatchMoments) -> BatchMoments:
        """Moments of both sets of images (see `engine.comparison.distances.moments.union`)."""
        from engine.comparison.distances.moments import union

        return BatchMoments(*union(self.count, self.mean, self.m2, other.count, other.mean, other.m2))


@dataclass
class TargetMoments:
    """What an averager needs of the target, in the kernels' dtype and feature order: `[D]` each."""

    mean: Tensor
    variance: Tensor


@dataclass
class Direction:
    """The result of one averager step.

    Attributes:
        a, b: `[D]`, the coefficients of ∂L/∂x_nd = a_d + b_d x_nd (docs/method.md, identity 1).
        sums: `[6]`, on the device: loss over means, loss over variances, ‖Δ^μ‖², ‖Δ^σ‖², loss, ‖Δ‖².
    """

    a: Tensor
    b: Tensor
    sums: Tensor


class Averager(ABC):
    """A number of steps, named state, and a way from the moments of a minibatch to a `Direction`.

    Every name of `state_names` is an attribute, a tensor `[2, D]` (or of as many rows as `rows` says); `steps` is a 0-d
    int64 tensor. They exist after `reset`.

    Args:
        starts: for state that does not start at zero, its value `[2, D]` in the public feature order, for D features.
    """

    steps: Tensor

    def __init__(self, starts: Mapping[str, Callable[[int], Tensor]] | None = None) -> None:
        self._starts = dict(starts or {})

    @property
    @abstractmethod
    def state_names(self) -> tuple[str, ...]:
        """Names of the state. Checkpoints hold each one as `averager.<name>`."""

    def rows(self, name: str) -> int:
        """Of the state `name`: [rows, D]."""
        return 2

    @abstractmethod
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
        """Take one step on the difference of `batch` and `target` (only read the state if not `advance`).

        Args:
            kernels: the backend.
            correction: c of the batch's variances m2/(N − c).
            weight: w `[D]`; the averager sees w·Δ^μ and w²·Δ^σ, and the coefficients carry w·v^μ and w²·v^σ.
        """

    @final
    def reset(self, num_features: int, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
        """State before the first step, for D = `num_features`, in the public order; float32 if there is no `dtype`."""
        import torch

        for name in self.state_names:
            state = torch.zeros(self.rows(name), num_features, dtype=dtype or torch.float32, device=device)
            if name in self._starts:
                state.copy_(self._starts[name](num_features))
            setattr(self, name, state)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)


class PlainAverager(Averager):
    """Base of averagers that are written in plain PyTorch: `direction` and the names of its state are all they need.

        class Momentum(PlainAverager):
            state_names = ("v",)
            v: Tensor

            def direction(self, difference, advance):
                v = 0.9 * self.v + difference
                if advance:
                    self.v.copy_(v)
                return v

    The loss is L = Σ v·Δ with v detached (paper, section 2.2).
    """

    @abstractmethod
    def direction(self, difference: Tensor, advance: bool) -> Tensor:
        """The direction v `[2, D]` that Δ `[2, D]` leads to; the state may change, in place, only when `advance`.

        `self.steps` counts the steps before this one.
        """

    @final
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
        """See `Averager.step`; the pieces of the reference backend around `direction`, whatever the backend."""
        import torch

        from kernels import reference

        with torch.no_grad():
            moments = torch.stack((batch.mean, batch.m2 / (batch.count - correction)))
            scale = None if weight is None else torch.stack((weight, weight.square()))
            difference = reference.difference(moments, torch.stack((target.mean, target.variance)), scale)
            v = self.direction(difference, advance)
            if advance:
                self.steps += 1
            loss = reference.matching_loss(v, difference)
            a, b = reference.coefficients(v if scale is None else scale * v, batch.mean, batch.count, correction)
            return Direction(a, b, reference.totals(loss, difference))


class FusedAverager(Averager):
    """Base of averagers that are a rule of `kernels.averager_step`.

    Args:
        rule: of `kernels.rules.RULES`, which says what state it keeps.
        rate, beta1, beta2: as of the operation.
        eps: Adam's ε.
        inner_mean: Adam's loss is the mean over D features instead of ½ their sum, which acts as ε·D/2.
        starts: see `Averager`.
    """

    def __init__(
        self,
        rule: str,
        rate: float = 0.0,
        beta1: float = 0.0,
        beta2: float = 0.0,
        eps: float = 0.0,
        inner_mean: bool = False,
        starts: Mapping[str, Callable[[int], Tensor]] | None = None,
    ):
        super().__init__(starts)
        self.rule, self.rate, self.beta1, self.beta2 = rule, rate, beta1, beta2
        self.eps, self.inner_mean = eps, inner_mean

    @final
    @property
    def state_names(self) -> tuple[str, ...]:
        from kernels.rules import RULES

        return RULES[self.rule].state

    @final
    def eps_for(self, num_features: int) -> float:
        """ε of the Adam step, in units of Δ."""
        return self.eps * (num_features / 2 if self.inner_mean else 1)

    @final
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
        """See `Averager.step`; one call of the backend's fused operation."""
        v, m, u = (
            getattr(self, name) if name in self.state_names else batch.mean.new_empty(2, 0) for name in ("v", "m", "u")
        )
        a, b, sums = kernels.averager_step(
            batch.mean,
            batch.m2,
            batch.count,
            target.mean,
            target.variance,
            v,
            m,
            u,
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


@final
class AMA(FusedAverager):
    """ADAM moving average (paper, section 2.2): Adam on ½‖v − Δ‖² gives the direction, L = Σ v·Δ with v detached.

        g = v − Δ        m ← β1 m + (1−β1) g        u ← β2 u + (1−β2) g²
        v ← v − α · (m/(1−β1^t)) / (√(u/(1−β2^t)) + ε)

    Args:
        lr: α.
        beta1: None means 0.9 for the paper's variant and 0.5 for the authors' code.
        beta2, eps: Adam's.
        variant: "paper" sums the inner loss over features and starts at v = 0; "authors" is the authors' code: the
            inner loss is a mean, whose gradients scaled by 2/D act as ε·D/2, and v starts uniform in ±1/√D.
            "authors-0.3" is the same with the Adam that it ran on, PyTorch 0.3's, which adds ε to √u before the bias of
            u is corrected: v ← v − α · √(1−β2^t)/(1−β1^t) · m/(√u + ε).
        seed: of that start; used by the authors' variants only.

    Raises ValueError for values out of range.
    """

    v: Tensor
    m: Tensor
    u: Tensor

    def __init__(
        self,
        lr: float = 1e-5,
        beta1: float | None = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
        variant: str = "paper",
        seed: int = 0,
    ):
        if variant not in AMA_VARIANTS:
            raise InputError("variant", f"{variant!r} is not one of {', '.join(AMA_VARIANTS)}")
        if not lr > 0:
            raise InputError("lr", f"must be positive, got {lr}")
        if beta1 is None:
            beta1 = 0.9 if variant == "paper" else 0.5
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise InputError(name, f"must be in [0, 1), got {value}")
        if not eps >= 0:
            raise InputError("eps", f"must not be negative, got {eps}")
        self.variant, self.seed = variant, seed
        authors = variant != "paper"
        rule = "ama_uncorrected" if variant == "authors-0.3" else "ama"
        starts = {"v": functools.partial(_uniform, seed)} if authors else {}
        super().__init__(rule, lr, beta1, beta2, eps, inner_mean=authors, starts=starts)


def _uniform(seed: int, num_features: int) -> Tensor:
    """[2, D] float64, uniform in ±1/√D."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2, num_features, dtype=torch.float64, generator=generator) * 2 - 1
    return uniform / math.sqrt(num_features)


@final
class MovingAverage(FusedAverager):
    """Moving average (paper, section 2.2, the baseline of Figure 4).

    Args:
        alpha: α in (0, 1]; None means 0.1 for the paper's variant and 1 for the authors' code.
        variant: "paper" averages the differences, v ← (1−α) v + α Δ from v = 0, L = Σ v·Δ with v detached; "authors"
            averages the batch's moments, M ← (1−α) M + α (m, s) from the first batch's, and L is the mean squared
            difference of M to the target, so that its gradient carries 2α/D.

    Raises ValueError for values out of range.
    """

    v: Tensor

    def __init__(self, alpha: float | None = None, variant: str = "paper"):
        if variant not in VARIANTS:
            raise InputError("variant", f"{variant!r} is not one of {', '.join(VARIANTS)}")
        if alpha is None:
            alpha = 0.1 if variant == "paper" else 1.0
        if not 0 < alpha <= 1:
            raise InputError("alpha", f"must be in (0, 1], got {alpha}")
        self.variant = variant
        super().__init__("ma" if variant == "paper" else "ma_moments", alpha)


@final
class NoAverage(FusedAverager):
    """No averaging (paper, equation 1): L = Σ Δ², so v = 2Δ. Stateless."""

    def __init__(self) -> None:
        super().__init__("none")


AVERAGERS: dict[str, type[Averager]] = {"ama": AMA, "ma": MovingAverage, "none": NoAverage}
"""The averagers by the names that configurations give them; each can be made without arguments."""
