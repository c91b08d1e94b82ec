"""Kernels of two sets of features, and the distances that they are made of.

A kernel is a callable k(x, y) of features x [n, F] and y [m, F] that returns the matrix [n, m] of all pairs, in x's
dtype, summed over the kernel's list of widths. All are differentiable any number of times in x and y. Half precision
and autocast are left out of the arithmetic: it is done in float32 at least.

`KERNELS` has every factory by its name. Cost: one product of [n, F] and [F, m], and a few passes over [n, m] for each
width; nothing of size [n, m, F].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.support.errors import InputError

Kernel = Callable[[Tensor, Tensor], Tensor]  # x [n, F], y [m, F] → [n, m]


class Pairs(NamedTuple):
    """What a radial kernel sees of x [n, F] and y [m, F]."""

    squares: Tensor  # [n, m] ‖x_i − y_j‖², none negative
    norms: Tensor  # [n, m] ‖x_i − c‖² + ‖y_j − c‖², detached: the error of the squares is relative to it
    size: int  # F


@runtime_checkable
class Radial(Protocol):
    """A kernel that depends on ‖x − y‖ alone, so that both sets may be shifted."""

    def of(self, pairs: Pairs) -> Tensor: ...


@dataclass(frozen=True)
class Gaussian:
    """Σ_σ exp(−‖x−y‖² / (2σ²)); see `gaussian`."""

    bandwidths: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidths", _positive("bandwidths", self.bandwidths))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return _radial(self, x, y)

    def of(self, pairs: Pairs) -> Tensor:
        return _total(torch.exp(pairs.squares * (-0.5 / width**2)) for width in self.bandwidths)


@dataclass(frozen=True)
class RationalQuadratic:
    """Σ_α (1 + ‖x−y‖² / (2α))^−α; see `rational_quadratic`."""

    alphas: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", _positive("alphas", self.alphas))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return _radial(self, x, y)

    def of(self, pairs: Pairs) -> Tensor:
        return _total(torch.exp(-alpha * torch.log1p(pairs.squares / (2 * alpha))) for alpha in self.alphas)


@dataclass(frozen=True)
class InverseMultiquadratic:
    """Σ_c c / (c + ‖x−y‖²); see `imq`."""

    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", _positive("scales", self.scales))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return _radial(self, x, y)

    def of(self, pairs: Pairs) -> Tensor:
        return _total(scale / (scale + pairs.squares) for scale in self.scales)


@dataclass(frozen=True)
class Energy:
    """−‖x−y‖; see `energy`."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return _radial(self, x, y)

    def of(self, pairs: Pairs) -> Tensor:
        return -_roots(pairs)


@dataclass(frozen=True)
class Linear:
    """x·y; see `linear`."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return _products(*_wide(x, y)).to(x.dtype)


@dataclass(frozen=True)
class Polynomial:
    """(x·y/F + 1)^degree; see `polynomial`."""

    degree: int

    def __post_init__(self) -> None:
        if isinstance(self.degree, bool) or not isinstance(self.degree, int) or self.degree < 1:
            raise InputError("degree", f"must be an integer of at least 1, got {self.degree!r}")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (_products(*_wide(x, y)) / x.shape[1] + 1).pow(self.degree).to(x.dtype)


@dataclass(frozen=True)
class Sum:
    """Σ k(x, y) over several kernels k."""

    kernels: tuple[Kernel, ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return _total(kernel(x, y) for kernel in self.kernels)


def gaussian(bandwidths: Iterable[float] = (1.0, 2.0, 4.0, 8.0, 16.0)) -> Gaussian:
    """k(x, y) = Σ_σ exp(−‖x−y‖² / (2σ²)), a mixture of Gaussians.

    The default widths are those of Li et al. 2017 (MMD-GAN) for a critic's features. Other features have another
    scale: multiply the widths with `median_distance`. The code of Li et al. 2015 (GMMN) has exp(−‖x−y‖²/(2σ)) instead:
    its σ is the square of ours.

    Raises:
        InputError: "bandwidths", if there are none or one isn't positive and finite.
    """
    return Gaussian(bandwidths)  # type: ignore[arg-type]  # any iterable becomes a tuple


def rational_quadratic(alphas: Iterable[float] = (0.2, 0.5, 1.0, 2.0, 5.0)) -> RationalQuadratic:
    """k(x, y) = Σ_α (1 + ‖x−y‖² / (2α))^−α, a mixture of Gaussians of all widths (Bińkowski et al. 2018).

    Its tails, and so its gradients, fade slower than a Gaussian's; small α, slow decay.

    Raises:
        InputError: "alphas", if there are none or one isn't positive and finite.
    """
    return RationalQuadratic(alphas)  # type: ignore[arg-type]


def rational_quadratic_linear(alphas: Iterable[float] = (0.2, 0.5, 1.0, 2.0, 5.0)) -> Sum:
    """k(x, y) = x·y + Σ_α (1 + ‖x−y‖² / (2α))^−α, rq* of Bińkowski et al. 2018.

    The product keeps a gradient where the two sets are so far apart that the bounded kernel has none.

    Raises:
        InputError: "alphas", if there are none or one isn't positive and finite.
    """
    return Sum((rational_quadratic(alphas), linear()))


def imq(scales: Iterable[float] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)) -> InverseMultiquadratic:
    """k(x, y) = Σ_c c / (c + ‖x−y‖²), the inverse multiquadratic as in Tolstikhin et al. 2018 (WAE, section 4).

    For codes z [n, nz] of a standard Gaussian WAE multiplies the default scales with 2·nz, the mean of ‖z−z'‖². Other
    authors call (c² + ‖x−y‖²)^−½ by the same name; this is not that one.

    Raises:
        InputError: "scales", if there are none or one isn't positive and finite.
    """
    return InverseMultiquadratic(scales)  # type: ignore[arg-type]


def energy() -> Energy:
    """k(x, y) = −‖x−y‖: with it MMD² is the energy distance 2 E‖x−y‖ − E‖x−x'‖ − E‖y−y'‖ (Székely & Rizzo 2013).

    The gradient at x = y is 0, a subgradient.
    """
    return Energy()


def linear() -> Linear:
    """k(x, y) = x·y: with it the biased MMD² is ‖mean x − mean y‖² (Gretton et al. 2012)."""
    return Linear()


def polynomial(degree: int = 3) -> Polynomial:
    """k(x, y) = (x·y/F + 1)^degree; KID's with degree 3 (Bińkowski et al. 2018).

    Raises:
        InputError: "degree", if it isn't an integer of at least 1.
    """
    return Polynomial(degree)


KERNELS: Final[dict[str, Callable[..., Kernel]]] = {
    "gaussian": gaussian,
    "rational-quadratic": rational_quadratic,
    "rational-quadratic-linear": rational_quadratic_linear,
    "imq": imq,
    "polynomial": polynomial,
    "linear": linear,
    "energy": energy,
}


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² of x [n, F] and y [m, F], as [n, m].

    Computed as ‖x−c‖² + ‖y−c‖² − 2 (x−c)·(y−c), c the mean of all rows: distances don't change when both sets are
    shifted, and the products lose fewer digits. Error: about √F · eps · (‖x−c‖² + ‖y−c‖²) in absolute terms (eps that
    of the dtype, or of TF32 where the caller allows it), so a distance that is tiny beside its points' distances from
    c has few digits. Negative values become 0, and so does the diagonal if x is y.

    The gradient is 2 Σ_j g_ij (x_i − y_j), also where a value was set to 0, and keeps all digits.
    """
    with full_precision(x):
        return _expand(x, y).squares


def distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖ of x [n, F] and y [m, F], as [n, m]; see `squared_distances`.

    Squares below their own rounding error, (8 + √F) · eps · (‖x−c‖² + ‖y−c‖²), count as 0, with gradient 0: duplicates
    would otherwise pull in a random direction. Above it a distance has the relative error of its square, halved, and
    so has that pair's part of the gradient, a unit vector.
    """
    with full_precision(x):
        return _roots(_expand(x, y))


def fixed(kernel: Kernel, y: Tensor, shift: Tensor) -> Callable[[Tensor], Tensor]:
    """x [n, F] ↦ k(x, y) [n, m] for one y [m, F] and many x, with what depends on y alone computed now.

    For a radial kernel that is y − c and ‖y − c‖², in y's dtype or float32 if that has fewer digits; c is `shift` [F],
    a point near y such as its mean. Then no call passes over y but for the product. Another kernel sees y as it is.
    """
    if isinstance(kernel, Sum):
        parts = [fixed(part, y, shift) for part in kernel.kernels]
        return lambda x: _total(part(x) for part in parts)
    return _Anchored(kernel, y, shift) if isinstance(kernel, Radial) else lambda x: kernel(x, y)


def median_distance(x: Tensor, limit: int = 1000) -> float:
    """The median of ‖x_i − x_j‖ over all pairs i < j of x [n, F]: the usual unit of a kernel's widths.

    With more than `limit` rows, over that many of them, the same ones for the same n. 0 if most rows are equal.
    Computed in float64, in memory for limit² distances.

    Raises:
        InputError: "x", if it isn't [n ≥ 2, F]; "limit", if it is below 2.
    """
    check_features("x", x, at_least=2)
    if limit < 2:
        raise InputError("limit", f"must be at least 2, got {limit}")
    rows = x.detach()
    if len(x) > limit:
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:limit]
        rows = rows[chosen.sort().values.to(x.device)]
    rows = rows.double()
    first, second = torch.triu_indices(len(rows), len(rows), offset=1, device=x.device)
    pairs = distances(rows, rows)[first, second].sort().values
    middle = len(pairs) // 2
    return float(pairs[middle] if len(pairs) % 2 else (pairs[middle - 1] + pairs[middle]) / 2)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast: it would multiply in half precision what is subtracted next."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def check_features(argument: str, features: Tensor, at_least: int = 1, size: int | None = None) -> None:
    """InputError that names the argument, unless it is a floating-point [n ≥ at_least, F], F = size if given."""
    if (
        features.dim() != 2
        or not features.is_floating_point()
        or len(features) < at_least
        or features.shape[1] != (features.shape[1] if size is None else size)
        or features.shape[1] == 0
    ):
        wanted = f"[n ≥ {at_least}, {'F' if size is None else size}]"
        raise InputError(argument, f"expected real features {wanted}, got {list(features.shape)} {features.dtype}")


class _Anchored:
    """See `fixed`."""

    def __init__(self, kernel: Radial, y: Tensor, shift: Tensor):
        dtype = torch.promote_types(y.dtype, torch.float32)
        self.kernel, self.shift = kernel, shift.to(dtype)
        self.rows = y.to(dtype) - self.shift
        self.norms = self.rows.square().sum(dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with full_precision(x):
            pairs = _pairs(x.to(dtype) - self.shift.to(dtype), self.rows.to(dtype), self.norms.to(dtype))
        return self.kernel.of(pairs).to(x.dtype)


def _radial(kernel: Radial, x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) [n, m] in x's dtype."""
    with full_precision(x):
        pairs = _expand(*_wide(x, y))
    return kernel.of(pairs).to(x.dtype)


def _expand(x: Tensor, y: Tensor) -> Pairs:
    """The pairs of x and y, both shifted by the mean of all rows."""
    with torch.no_grad():  # constant: no distance depends on it
        shift = (x.mean(dim=0) * len(x) + y.mean(dim=0) * len(y)) / (len(x) + len(y))
    rows = x - shift
    if x is y:
        return _pairs(rows, rows)
    y = y - shift
    return _pairs(rows, y, y.square().sum(dim=1))


def _pairs(x: Tensor, y: Tensor, norms: Tensor | None = None) -> Pairs:
    """The pairs of x and y as they are; `norms` [m] are ‖y‖², None if y is x."""
    of_x = x.square().sum(dim=1)
    sums = of_x[:, None] + (of_x if norms is None else norms)[None, :]
    squares = sums - 2 * (x @ y.T)
    # The clamp changes values alone: as a function to differentiate it would lose the gradients of the values it sets.
    values = squares.detach().clamp_min(0)
    if norms is None:
        values.fill_diagonal_(0)
    return Pairs(squares + (values - squares.detach()), sums.detach(), x.shape[1])


def _roots(pairs: Pairs) -> Tensor:
    """‖x_i − y_j‖ [n, m]; 0 where the square is within its error."""
    floor = pairs.norms * ((8 + math.sqrt(pairs.size)) * torch.finfo(pairs.norms.dtype).eps)
    apart = pairs.squares.detach() > floor
    return torch.where(
        apart, torch.where(apart, pairs.squares, 1.0).sqrt(), 0.0
    )  # √ of 1, not 0: no infinite derivative


def _products(x: Tensor, y: Tensor) -> Tensor:
    """x_i·y_j [n, m]."""
    with full_precision(x):
        return x @ y.T


def _wide(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in x's dtype, or in float32 if that has fewer digits."""
    check_features("x", x)
    check_features("y", y, size=x.shape[1])
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (wide := x.to(dtype)), (wide if x is y else y.to(dtype))


def _total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    first, *others = terms
    for other in others:
        first = first + other
    return first


def _positive(argument: str, values: Iterable[float]) -> tuple[float, ...]:
    """The values as a tuple; InputError that names the argument unless there are some, all positive and finite."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise InputError(argument, f"expected a list of numbers, got {values!r}") from None
    if not numbers:
        raise InputError(argument, "expected at least one number, got none")
    for number in numbers:
        if not (math.isfinite(number) and number > 0):
            raise InputError(argument, f"must be positive and finite, got {number}")
    return numbers
