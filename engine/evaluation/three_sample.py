"""Which of two sets of samples is closer to the real images: the three-sample test with KID's kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from engine.comparison.distances import kernels
from engine.support.errors import InputError


@dataclass(frozen=True)
class RelativeDistance:
    """How much farther than `old` samples `new` ones are from the real images.

    Attributes:
        difference: MMD²(real, new) − MMD²(real, old), unbiased; negative where the new samples are closer.
        deviation: its standard deviation.
    """

    difference: float
    deviation: float

    @property
    def p_value(self) -> float:
        """Of the hypothesis that the new samples are no closer than the old ones: Φ(difference / deviation)."""
        if self.deviation == 0:
            return 1.0
        return 0.5 * math.erfc(-self.difference / self.deviation / math.sqrt(2))


def three_sample_test(real: Tensor, new: Tensor, old: Tensor) -> RelativeDistance:
    """Compare MMD²(real, new) with MMD²(real, old) (Bounliphone et al. 2016, section 3), KID's kernel.

    Of features x, y with F dimensions, k(x, y) = (x·y/F + 1)³ (Bińkowski et al. 2018; `kernels.polynomial`). What the
    two distances share, the mean of k over real pairs, cancels:

        difference = mean_{i≠j} k(new_i, new_j) − 2 mean k(real, new) − mean_{i≠j} k(old_i, old_j) + 2 mean k(real, old)

    It is asymptotically normal. Its variance is the sum over the three sets of Var(h)/n, where h is what one sample
    contributes to first order: 2 (mean_j k(new_i, new_j) − mean_r k(real_r, new_i)) for a new one, the same for an old
    one, and 2 (mean k(real_r, old) − mean k(real_r, new)) for a real one.

    The three sets must be independent: new and old samples must not come from the same z. If all three distributions
    are equal, the first-order term vanishes and the test is uninformative.

    Args:
        real, new, old: features [n, F] of at least two images each; the numbers of images may differ.

    Computed in float64, in memory for the larger of new and old times real.

    Raises:
        InputError: the set that isn't [n ≥ 2, F] with real's F.
    """
    sets = {"real": real, "new": new, "old": old}
    for name, features in sets.items():
        if features.dim() != 2 or len(features) < 2 or features.shape[1] != real.shape[1]:
            raise InputError(name, f"expected features [n ≥ 2, {real.shape[-1]}], got {list(features.shape)}")
    real, new, old = (features.double() for features in sets.values())
    within_new, near_new = _mean_kernels(new, real)
    within_old, near_old = _mean_kernels(old, real)
    difference = within_new.mean() - 2 * near_new[0].mean() - within_old.mean() + 2 * near_old[0].mean()
    variance = sum(
        (2 * part).var() / len(part)
        for part in (within_new - near_new[0], within_old - near_old[0], near_old[1] - near_new[1])
    )
    return RelativeDistance(float(difference), float(variance) ** 0.5)


def _mean_kernels(samples: Tensor, real: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """For every sample its mean kernel with the others [n] and with the real ones [n]; the latter for every real one,
    too [m]."""
    kernel = kernels.polynomial(degree=3)
    within = kernel(samples, samples)
    others = (within.sum(dim=1) - within.diagonal()) / (len(samples) - 1)
    across = kernel(samples, real)
    return others, (across.mean(dim=1), across.mean(dim=0))
