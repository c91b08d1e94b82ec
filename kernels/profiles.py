"""The kernels k(x, y) that `pairwise_sums` of every backend knows: the one table of what they are functions of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_PARAMETERS = 8


@dataclass(frozen=True)
class Profile:
    """k(x, y) = Σ_p f(t; p), a sum over the kernel's parameters; f and f' are `profile` of every backend.

    Attributes:
        radial: whether t is ‖x−y‖²; otherwise it is x·y.
        least, most: how many parameters there are.
        integral: whether they are whole numbers of at least 1.
    """

    radial: bool
    least: int = 0
    most: int = 0
    integral: bool = False


PROFILES = {
    "gaussian": Profile(radial=True, least=1, most=MOST_PARAMETERS),
    "rational-quadratic": Profile(radial=True, least=1, most=MOST_PARAMETERS),
    "imq": Profile(radial=True, least=1, most=MOST_PARAMETERS),
    "energy": Profile(radial=True),
    "linear": Profile(radial=False),
    "polynomial": Profile(radial=False, least=1, most=1, integral=True),
}


def check_profile(kernel: str, parameters: Sequence[float]) -> None:
    """ValueError that names the argument, unless the kernel is known and the parameters are such as it takes."""
    if kernel not in PROFILES:
        raise ValueError(f"kernel: {kernel!r} is not one of {', '.join(PROFILES)}")
    profile, count = PROFILES[kernel], len(parameters)
    if not profile.least <= count <= profile.most:
        wanted = str(profile.most) if profile.least == profile.most else f"{profile.least} to {profile.most}"
        raise ValueError(f"parameters: {kernel!r} takes {wanted}, got {count}")
    for parameter in parameters:
        if not (math.isfinite(parameter) and parameter > 0) or (profile.integral and parameter != int(parameter)):
            kind = "whole numbers of at least 1" if profile.integral else "positive and finite"
            raise ValueError(f"parameters: must be {kind}, got {parameter}")


def rounding_floor(features: int, eps: float) -> float:
    """ε such that a squared distance below ε·(‖x‖² + ‖y‖²) of centred rows [F] may be nothing but rounding."""
    return (8 + math.sqrt(features)) * eps
