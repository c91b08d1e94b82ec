"""Distances of optimal transport: the Sinkhorn divergence, and the sliced Wasserstein distance."""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
from torch import Tensor

from engine.comparison.distances.first_order import with_gradient
from engine.comparison.distances.kernels import check_features, full_precision, squared_distances
from engine.support.errors import InputError

_CHECK_EVERY = 10  # iterations between two looks at the error: on a GPU, each one waits for the device


def sinkhorn(
    x: Tensor,
    y: Tensor,
    epsilon: float = 0.05,
    iterations: int = 500,
    tolerance: float | None = 1e-4,
    relative: bool = True,
) -> Tensor:
    """The Sinkhorn divergence of features x [n, F] and y [m, F], as [] (Genevay et al. 2018; Feydy et al. 2019).

        S_ε(x, y) = OT_ε(x, y) − ½ OT_ε(x, x) − ½ OT_ε(y, y)
        OT_ε(x, y) = min over P with marginals 1/n and 1/m of  Σ_ij P_ij ‖x_i − y_j‖² + ε Σ_ij P_ij log(P_ij n m)

    Never negative and 0 if both sets are equal, but for rounding and what the iterations leave. ε → 0 is the squared
    2-Wasserstein distance, ε → ∞ the squared distance of means.

    The potentials are found by Sinkhorn's iterations in the log domain, in x's dtype (float32 for half precision),
    those of a set and itself by the symmetric ones, which need fewer. The value is the dual's at the potentials that
    were found, a lower bound of OT_ε. The gradient is by the envelope theorem: Σ_j P_ij 2 (x_i − y_j) for the plan P of
    those potentials, without a graph through the iterations; its error is that of the plan. Differentiable once, in x
    and y; a second derivative raises RuntimeError. A relative ε counts as a constant, though it is the cost's.

    Cost: three products of features, and an exponential and a few passes over [n, m], [n, n] and [m, m] in every
    iteration. Memory: a few such matrices.

    Args:
        x: features [n, F].
        y: features [m, F].
        epsilon: ε in multiples of the mean of ‖x_i − y_j‖², or in the cost's own unit if not `relative`.
        iterations: the most that each of the three problems gets. Small ε needs many.
        tolerance: stop where the plan's row sums are wrong by less than this in total, of 1. It is looked at every 10
            iterations, which waits for the device; with None every problem gets all its iterations and nothing waits.
        relative: what unit ε has.

    Raises:
        InputError: "x" or "y", if it isn't [n ≥ 1, F]; "y", if its F isn't x's; "epsilon", "tolerance" or "iterations",
            if it isn't positive and finite.
    """
    check_features("x", x)
    check_features("y", y, size=x.shape[1])
    _check_positive("epsilon", epsilon)
    if tolerance is not None:
        _check_positive("tolerance", tolerance)
    _check_count("iterations", iterations)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    other = wide if y is x else y.to(wide.dtype)
    costs = [squared_distances(*pair) for pair in ((wide, other), (wide, wide), (other, other))]
    scale = costs[0].detach().mean() if relative else wide.new_ones(())
    scale = torch.where(scale == 0, 1.0, scale)  # where all costs are 0
    across, of_x, of_y = (
        _transport(cost, epsilon * scale, iterations, tolerance, symmetric)
        for cost, symmetric in zip(costs, (False, True, True), strict=True)
    )
    return (across - of_x / 2 - of_y / 2).to(wide.dtype)


class Sinkhorn:
    """The Sinkhorn divergence to a fixed set of features: `sinkhorn` as a function of x alone.

    ½ OT_ε(y, y) is computed once, and ε with it: in units of the mean of ‖y_i − y_j‖², so that it is the same number at
    every call. A call costs what `sinkhorn` does without its third problem.

    Args:
        y: features [m, F] of the real images; kept without a graph.
        epsilon: ε in multiples of the mean of ‖y_i − y_j‖².
        iterations, tolerance: as for `sinkhorn`.

    Raises:
        InputError: "y", if it isn't [m ≥ 1, F]; "epsilon", "tolerance" or "iterations", as for `sinkhorn`.
    """

    def __init__(self, y: Tensor, epsilon: float = 0.05, iterations: int = 500, tolerance: float | None = 1e-4):
        check_features("y", y)
        _check_positive("epsilon", epsilon)
        if tolerance is not None:
            _check_positive("tolerance", tolerance)
        _check_count("iterations", iterations)
        y = y.detach()
        self.shift, self.iterations, self.tolerance = y.mean(dim=0), iterations, tolerance
        self.y = y - self.shift  # distances don't change, and products lose fewer digits
        cost = squared_distances(self.y, self.y)
        scale = cost.mean()
        self.epsilon = epsilon * torch.where(scale == 0, 1.0, scale)
        self.constant = _solve(cost / self.epsilon, self.epsilon, iterations, tolerance, True)[0]

    def __call__(self, x: Tensor) -> Tensor:
        """S_ε of x [n, F] and y, as []; differentiable once.

        The gradient, Σ_j P_ij 2 (x_i − y_j) − Σ_j Q_ij 2 (x_i − x_j) of the two plans, is found with the value:
        besides x there are two more matrices [n, F] at a time, and no graph.

        Raises:
            InputError: "x", if it isn't [n ≥ 1, F] with y's F.
        """
        check_features("x", x, size=self.y.shape[1])
        wanted = x.requires_grad and torch.is_grad_enabled()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.no_grad(), full_precision(x):
            value, gradient = self._of_sample(wide.detach(), wanted)
        return (value if gradient is None else with_gradient(wide, value, gradient)).to(wide.dtype)

    def _of_sample(self, x: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        rows, y = x - self.shift.to(x.dtype), self.y.to(x.dtype)
        epsilon = self.epsilon.to(x.dtype)
        solve = partial(_solve, epsilon=epsilon, iterations=self.iterations, tolerance=self.tolerance)
        across, plan = solve(_squares(rows, y).div_(epsilon), symmetric=False)
        of_x, own = solve(_squares(rows, rows).div_(epsilon), symmetric=True)
        value = across - of_x / 2 - self.constant / 2
        if not wanted:
            return value, None
        pairs = own + own.T
        gradient = rows * (2 * plan.sum(dim=1) - pairs.sum(dim=1))[:, None]
        return value, gradient.addmm_(plan, y, alpha=-2).addmm_(pairs, rows)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 128, seed: int = 0) -> Tensor:
    """The squared sliced 2-Wasserstein distance of features x [n, F] and y [m, F], as [] (Bonneel et al. 2015).

        1/L Σ_l W₂²(x·θ_l, y·θ_l),    W₂²(u, v) = ∫₀¹ (u_(q) − v_(q))² dq

    with L directions θ (`directions`), and the quantiles u_(q) of the sorted values, of which n and m may differ. It is
    the mean over directions of the square, not rooted: 0 has a gradient. Differentiable in x and y as often as needed,
    where no two values of a projection are equal; there the gradient is one of the possible orders'.

    In x's dtype (float32 for half precision). Cost: the products [n + m, F] · [F, L] and L sorts. Memory: a few
    matrices [n + m, L].

    Args:
        x: features [n, F].
        y: features [m, F].
        projections: L, how many directions.
        seed: of the directions; another one each step gives another unbiased estimate of the mean over all directions.

    Raises:
        InputError: "x" or "y", if it isn't [n ≥ 1, F]; "y", if its F isn't x's; "projections", if it is below 1.
    """
    check_features("x", x)
    check_features("y", y, size=x.shape[1])
    _check_count("projections", projections)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    onto = directions(x.shape[1], projections, seed).to(wide)
    with full_precision(x):
        first, second = ((rows @ onto).sort(dim=0).values for rows in (wide, y.to(wide.dtype)))
    of_first, of_second, weights = _common_quantiles(len(x), len(y), x.device)
    gaps = (first[of_first] - second[of_second]).square()
    found: Tensor = (weights @ gaps.double()).mean().to(wide.dtype)
    return found


def directions(size: int, count: int, seed: int = 0) -> Tensor:
    """`count` directions on the unit sphere of `size` features, [size, count] float64, the same ones for a seed."""
    drawn = torch.randn(size, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit: Tensor = drawn / torch.linalg.vector_norm(drawn, dim=0)
    return unit


def _transport(cost: Tensor, epsilon: Tensor, iterations: int, tolerance: float | None, symmetric: bool) -> Tensor:
    """OT_ε of a cost [n, m], [] float64, whose gradient is the plan [n, m]."""
    return with_gradient(cost, *_solve(cost.detach() / epsilon, epsilon, iterations, tolerance, symmetric))


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖² [n, m] of centred rows, without a graph: no matrix besides."""
    squares = torch.mm(x, y.T).mul_(-2)
    squares += torch.linalg.vector_norm(x, dim=1).square()[:, None]
    squares += torch.linalg.vector_norm(y, dim=1).square()
    squares.clamp_min_(0)
    return squares.fill_diagonal_(0) if x is y else squares


@torch.no_grad()
def _solve(
    cost: Tensor, epsilon: Tensor, iterations: int, tolerance: float | None, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """OT_ε of a cost [n, m] in units of ε, [] float64, and the plan [n, m], in the cost's place."""
    solve = _symmetric_potentials if symmetric else _potentials
    f, g = solve(cost, iterations, tolerance)
    plan = cost.neg_().add_(f[:, None]).add_(g[None, :]).sub_(math.log(cost.numel())).exp_()
    mass = plan.sum(dtype=torch.float64)  # 1 but for the iterations that are missing
    value = epsilon * (f.mean(dtype=torch.float64) + g.mean(dtype=torch.float64) - mass + 1)
    return value, plan


def _potentials(cost: Tensor, iterations: int, tolerance: float | None) -> tuple[Tensor, Tensor]:
    """Potentials f [n] and g [m] of a cost [n, m] in units of ε, where exp(f + g − cost) / m sums to 1 over a row."""
    g = cost.new_zeros(cost.shape[1])
    f = _update(cost, g)
    for count in range(1, iterations):
        g = _update(cost.T, f)
        new = _update(cost, g)
        # A row of the plan of the old f and this g sums to exp(f − new) / n.
        if tolerance is not None and count % _CHECK_EVERY == 0 and _row_error(f - new) < tolerance:
            return new, g
        f = new
    return f, g


def _symmetric_potentials(cost: Tensor, iterations: int, tolerance: float | None) -> tuple[Tensor, Tensor]:
    """One potential f [n] of a symmetric cost [n, n] in units of ε, twice: the mean of each f and its update."""
    f = cost.new_zeros(len(cost))
    for count in range(iterations):
        update = _update(cost, f)
        if tolerance is not None and count % _CHECK_EVERY == 0 and _row_error(f - update) < tolerance:
            return f, f
        f = (f + update) / 2
    return f, f


def _update(cost: Tensor, potential: Tensor) -> Tensor:
    """−log of the mean over j of exp(potential_j − cost_ij), [n]."""
    return math.log(cost.shape[1]) - (potential[None, :] - cost).logsumexp(dim=1)


def _row_error(excess: Tensor) -> float:
    """The mean of |exp(excess) − 1|: by how much row sums of the plan are wrong, in total."""
    return float(excess.expm1().abs().mean())


@lru_cache(maxsize=16)  # the sizes of a minibatch don't change
def _common_quantiles(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces of [0, 1] on which both sets' quantiles are constant: their index into n and m values, and length.

    In whole multiples of 1/(nm), so that no piece is lost or made by rounding; [at most n + m − 1] each, weights
    float64.
    """
    with torch.inference_mode(False):  # the next call may be one that is differentiated
        ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        weights = (ends - starts).double() / (n * m)
        return (starts // m).to(device), (starts // n).to(device), weights.to(device)


def _check_positive(argument: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(argument, f"must be positive and finite, got {value}")


def _check_count(argument: str, value: int) -> None:
    if value < 1:
        raise InputError(argument, f"must be at least 1, got {value}")
