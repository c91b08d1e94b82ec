"""What every game asks of the critic's outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.comparison.distances.kernels import check_features
from engine.support.errors import InputError


def checked(real: Tensor, fake: Tensor, outputs: int | None = None) -> tuple[Tensor, Tensor]:
    """Both as they are, half precision in float32; a mean of many half-precision numbers would lose digits.

    Raises:
        InputError: "real", if it isn't floating-point [n ≥ 1, F], F = `outputs` if given; "fake", if it isn't the same
            with the same F.
    """
    check_features("real", real, size=outputs)
    check_features("fake", fake, size=real.shape[1])
    return wide(real), wide(fake)


def checked_fake(fake: Tensor) -> Tensor:
    """The outputs for generated images alone, one an image, half precision in float32.

    Raises:
        InputError: "fake", if it isn't floating-point [m ≥ 1, 1].
    """
    check_features("fake", fake, size=1)
    return wide(fake)


def wide(outputs: Tensor) -> Tensor:
    """Half precision in float32, anything else as it is."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def check_positive(argument: str, value: float, at_most: float = math.inf) -> None:
    """InputError that names the argument, unless it is a finite number in (0, at_most]."""
    if not (math.isfinite(value) and 0 < value <= at_most):
        limit = "finite" if at_most == math.inf else f"at most {at_most:g}"
        raise InputError(argument, f"must be positive and {limit}, got {value}")
