"""Distances of two point masses, and of two Gaussians on a line, by the engine's functions and in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.special import lambertw
from scipy.stats import norm
from torch import Tensor

from bench.rows import Row
from bench.toy.dirac import Line
from engine.comparison.distances import energy_distance, frechet, kernels, mmd, sinkhorn, sliced_wasserstein
from engine.comparison.games import GAMES
from engine.comparison.games.fisher import fisher_distance
from engine.comparison.games.penalties import PENALTIES, Play

THETAS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
GAUSSIANS = ((0.0, 1.0), (0.5, 1.0), (2.0, 1.0), (0.0, 0.5), (1.0, 2.0))
"""(mean, deviation) of the generated law; the real one is N(0, 1)."""
WEIGHT = 10.0  # λ of the scaled MMD
EPSILON = 0.5  # of Sinkhorn's divergence, in units of squared lengths
_SAMPLES, _TRANSPORTED = 2000, 300
_KERNEL = kernels.gaussian([1.0])
_SURE = 40.0  # a logit for certainty
_LOGARITHMS = (math.log(1e-3), math.log(1e3))  # of a critic's slope, which is 1 over a kernel's width

Distance = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True, kw_only=True)
class DistanceRow(Row):
    """One distance in several settings.

    Attributes:
        laws: "points", δ_0 and δ_θ; or "gaussians", N(0, 1) and N(m, s²).
        name: of the distance.
        by: what computes it.
        settings: θ, or (m, s).
        found, known: the distance in each of them: by the engine, and in closed form.
        error: the largest difference of both.
        slope: of points, by θ at θ = 1: what the generator feels.
    """

    laws: str
    name: str
    by: str
    settings: Sequence[float] | Sequence[Sequence[float]]
    found: Sequence[float]
    known: Sequence[float]
    error: float
    slope: float | None = None


def optimised(scaled: bool) -> Distance:
    """The largest MMD² of ψx and ψy over ψ > 0, divided or not by the critic's scale, 1 + λ (1 + ψ²)."""
    game, penalty = GAMES["mmd"](_KERNEL), PENALTIES["scaled"](_KERNEL, WEIGHT)

    def negative(logarithm: float, real: Tensor, fake: Tensor) -> float:
        critic = Line(torch.tensor(math.exp(logarithm), dtype=torch.float64))
        play = Play(critic, real, fake, critic(real), critic(fake), lambda count: real.expand(-1, count))
        loss = game.critic_loss(play.phi_real, play.phi_fake)
        return (penalty.applied(loss, penalty.terms(play)) if scaled else loss).item()

    def distance(real: Tensor, fake: Tensor) -> float:
        tried = np.linspace(*_LOGARITHMS, 41)
        best = int(np.argmin([negative(value, real, fake) for value in tried]))
        bounds = tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)]
        refined = minimize_scalar(negative, bounds=bounds, args=(real, fake), method="bounded", options={"xatol": 1e-9})
        return -min(refined.fun, negative(bounds[1], real, fake))

    return distance


def scaled_of_points(theta: float) -> float:
    """max over u = ψ² of 2 (1 − exp(−uθ²/2)) / (1 + λ + λu), by Lambert's W.

    With a = uθ²/2 and c = (1+λ)θ²/(2λ) its derivative is 0 where exp(a) = 1 + a + c: a = −W₋₁(−exp(−1−c)) − 1 − c.
    """
    if theta == 0:
        return 0.0
    c = (1 + WEIGHT) * theta**2 / (2 * WEIGHT)
    a = -lambertw(-math.exp(-1 - c), -1).real - 1 - c
    return 2 * -math.expm1(-a) / (1 + WEIGHT + WEIGHT * 2 * a / theta**2)


def _outputs(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    return critic(real), critic(fake)


def jensen_shannon(ratio: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> float:
    """log 2 − ½ of what the best critic, log p/q, loses at minimax."""
    return math.log(2) - GAMES["minimax"]().critic_loss(*_outputs(ratio, real, fake)).item() / 2


def total_variation(ratio: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> float:
    """1 − ½ of what the best critic, the sign of log p/q, loses at the hinge game."""
    return 1 - GAMES["hinge"]().critic_loss(*_outputs(lambda x: ratio(x).sign(), real, fake)).item() / 2


def wasserstein(real: Tensor, fake: Tensor) -> float:
    """Minus what the best critic of slope ±1 loses at the Wasserstein game; for laws that are shifts of one another."""
    direction = torch.sign(real.mean() - fake.mean())
    return -GAMES["wasserstein"]().critic_loss(*_outputs(lambda x: direction * x, real, fake)).item()


def fisher(ratio: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> float:
    """What the best critic, (p − q)/(p + q) = tanh(½ log p/q), makes of the Fisher game."""
    return fisher_distance(*_outputs(lambda x: (ratio(x) / 2).tanh(), real, fake)).item()


def kullback_leibler(ratio: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> float:
    """The mean of log p/q over real ones."""
    return ratio(real).mean().item()


def point_rows() -> list[DistanceRow]:
    """Every distance of δ_0 and δ_θ."""
    return [_point_row(*case) for case in _of_points()]


def point_curves(count: int = 41) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name → `count` θ from −3 to 3, and the distance of δ_0 and δ_θ there."""
    thetas = np.linspace(-3, 3, count)
    return {
        name: (thetas, np.array([at_points(distance, float(theta)) for theta in thetas]))
        for name, _, distance, _ in _of_points()
    }


def at_points(distance: Distance, theta: float) -> float:
    """Of δ_0 and δ_θ; two copies of each point, as an unbiased MMD and a covariance need."""
    real = torch.zeros(2, 1, dtype=torch.float64)
    return distance(real, real + theta)


def _of_points() -> list[tuple[str, str, Distance, Callable[[float], float]]]:
    """(name, what computes it, the distance, θ → its value in closed form)."""

    def of_ratio(function: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], float]) -> Distance:
        def distance(real: Tensor, fake: Tensor) -> float:
            sure = 0.0 if torch.equal(real, fake) else _SURE
            return function(lambda x: torch.where(x == 0, sure, -sure), real, fake)

        return distance

    def apart(value: float) -> Callable[[float], float]:
        return lambda theta: value if theta else 0.0

    def square(theta: float) -> float:
        return theta**2

    return [
        ("total variation", "`hinge`, best critic", of_ratio(total_variation), apart(1.0)),
        ("Jensen-Shannon", "`minimax`, best critic", of_ratio(jensen_shannon), apart(math.log(2))),
        ("Fisher", "`fisher`, best critic", of_ratio(fisher), apart(2.0)),
        ("Wasserstein-1", "`wasserstein`, best critic", wasserstein, abs),
        ("sliced Wasserstein-2, squared", "`sliced_wasserstein`", _item(sliced_wasserstein), square),
        ("Sinkhorn", "`sinkhorn`", _sinkhorn, square),
        ("Fréchet", "`frechet`", _item(frechet), square),
        ("energy", "`energy_distance`", _item(energy_distance), lambda theta: 2 * abs(theta)),
        ("MMD², linear", "`mmd`", _mmd(kernels.linear()), square),
        ("MMD², Gaussian, σ = 1", "`mmd`", _mmd(_KERNEL), lambda theta: 2 * -math.expm1(-(theta**2) / 2)),
        ("MMD², best σ", "game `mmd`, best critic", optimised(False), apart(2.0)),
        (f"scaled MMD, λ = {WEIGHT:g}", "penalty `scaled`, best critic", optimised(True), scaled_of_points),
    ]


def _point_row(name: str, by: str, distance: Distance, known: Callable[[float], float]) -> DistanceRow:
    found = [at_points(distance, theta) for theta in THETAS]
    closed = [float(known(theta)) for theta in THETAS]
    step = 1e-3
    return DistanceRow(
        laws="points",
        name=name,
        by=by,
        settings=THETAS,
        found=found,
        known=closed,
        error=_largest_gap(found, closed),
        slope=(at_points(distance, 1 + step) - at_points(distance, 1 - step)) / (2 * step),
    )


def gaussian_rows() -> list[DistanceRow]:
    """Every distance of N(0, 1) and N(m, s²), from the quantiles of both."""
    cases: list[tuple[str, str, Callable[[float, float], Distance], Callable[[float, float], float]]] = [
        ("total variation", "`hinge`, best critic", _of_log_ratio(total_variation), _by_integral(_tv_density)),
        ("Jensen-Shannon", "`minimax`, best critic", _of_log_ratio(jensen_shannon), _by_integral(_js_density)),
        ("Kullback-Leibler", "mean of log p/q", _of_log_ratio(kullback_leibler), _known_kl),
        ("Fisher", "`fisher`, best critic", _of_log_ratio(fisher), _known_fisher),
        ("Wasserstein-2, squared", "`sliced_wasserstein`", _same(_item(sliced_wasserstein)), _known_w2),
        ("Fréchet", "`frechet`", _same(_item(frechet)), _known_w2),
        (f"Sinkhorn, ε = {EPSILON:g}", "`sinkhorn`", _same(_sinkhorn), _known_sinkhorn),
        ("energy", "`energy_distance`", _same(_item(energy_distance)), _known_energy),
        ("MMD², Gaussian, σ = 1", "`mmd`", _same(_mmd(_KERNEL)), _known_mmd),
    ]
    return [_gaussian_row(*case) for case in cases]


def _gaussian_row(
    name: str, by: str, distance: Callable[[float, float], Distance], known: Callable[[float, float], float]
) -> DistanceRow:
    count = _TRANSPORTED if name.startswith("Sinkhorn") else _SAMPLES
    normal = torch.from_numpy(norm.ppf((np.arange(count) + 0.5) / count))[:, None]
    found = [distance(mean, deviation)(normal, mean + deviation * normal) for mean, deviation in GAUSSIANS]
    closed = [float(known(*setting)) for setting in GAUSSIANS]
    return DistanceRow(
        laws="gaussians",
        name=name,
        by=f"{by}, {count} quantiles",
        settings=GAUSSIANS,
        found=found,
        known=closed,
        error=_largest_gap(found, closed),
    )


def _largest_gap(found: Sequence[float], known: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, known, strict=True))


def _item(function: Callable[[Tensor, Tensor], Tensor]) -> Distance:
    return lambda x, y: function(x, y).item()


def _mmd(kernel: kernels.Kernel) -> Distance:
    return lambda x, y: mmd(x, y, kernel).item()


def _sinkhorn(x: Tensor, y: Tensor) -> float:
    return sinkhorn(x, y, epsilon=EPSILON, relative=False, tolerance=1e-5).item()


def _same(distance: Distance) -> Callable[[float, float], Distance]:
    return lambda mean, deviation: distance


def _of_log_ratio(
    function: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], float],
) -> Callable[[float, float], Distance]:
    def of(mean: float, deviation: float) -> Distance:
        def ratio(x: Tensor) -> Tensor:
            return ((x - mean) / deviation).square() / 2 + math.log(deviation) - x.square() / 2

        return lambda real, fake: function(ratio, real, fake)

    return of


def _by_integral(density: Callable[[float, float], float]) -> Callable[[float, float], float]:
    """∫ of a function of both densities."""

    def known(mean: float, deviation: float) -> float:
        def at(x: float) -> float:
            return density(float(norm.pdf(x)), float(norm.pdf(x, mean, deviation)))

        return float(quad(at, -12, 14, points=(0.0, mean), limit=400)[0])

    return known


def _tv_density(p: float, q: float) -> float:
    return abs(p - q) / 2


def _js_density(p: float, q: float) -> float:
    return sum(a / 2 * math.log(2 * a / (p + q)) for a in (p, q) if a > 0)


def _chi_density(p: float, q: float) -> float:
    return (p - q) ** 2 / ((p + q) / 2) if p + q else 0.0


def _known_fisher(mean: float, deviation: float) -> float:
    return math.sqrt(_by_integral(_chi_density)(mean, deviation))


def _known_kl(mean: float, deviation: float) -> float:
    return math.log(deviation) + (1 + mean**2) / (2 * deviation**2) - 0.5


def _known_w2(mean: float, deviation: float) -> float:
    return mean**2 + (deviation - 1) ** 2


def _known_energy(mean: float, deviation: float) -> float:
    def folded(mu: float, variance: float) -> float:
        """E|N(μ, v)|."""
        spread = math.sqrt(variance)
        return 2 * spread * float(norm.pdf(mu / spread)) + mu * (2 * float(norm.cdf(mu / spread)) - 1)

    return 2 * folded(mean, 1 + deviation**2) - folded(0, 2) - folded(0, 2 * deviation**2)


def _known_mmd(mean: float, deviation: float) -> float:
    def expected(variance: float, shift: float = 0.0) -> float:
        """E exp(−d²/2), d ~ N(shift, variance)."""
        return math.exp(-(shift**2) / (2 * (1 + variance))) / math.sqrt(1 + variance)

    return expected(2) + expected(2 * deviation**2) - 2 * expected(1 + deviation**2, mean)


def _known_sinkhorn(mean: float, deviation: float) -> float:
    """Janati et al. 2020 (arXiv 2006.02572), theorem 1, for ε = 2σ² and one dimension."""

    def transport(a: float, b: float) -> float:
        """OT_ε of N(0, a) and N(0, b)."""
        half = EPSILON / 2
        root = math.sqrt(4 * a * b + half**2)
        return a + b - root + half * (1 - math.log(2 * half)) + half * math.log(root + half)

    variance = deviation**2
    return mean**2 + transport(1, variance) - transport(1, 1) / 2 - transport(variance, variance) / 2
