"""What generated points feel of a critic that learns MMD's kernel in two dimensions, early and late.

Generated and real points stay where they are, and the critic φ alone is trained: with the game `mmd` as it is, with a
gradient penalty on the witness (Bińkowski et al. 2018), with the scaled MMD (Arbel et al. 2018, arXiv 1805.11565), and
with the paper's spectral parametrisation besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.rows import Row
from engine.comparison.distances import kernels
from engine.comparison.games import GAMES
from engine.comparison.games.penalties import PENALTIES, Penalty, Play
from engine.representation.critics.spectral import normalise_spectrally

STEPS = (5, 150, 1000)
"""Early, on the way, and late."""
GRID, SIDE = 40, 3.0  # points on a side of the contour's grid, which reaches from -SIDE to SIDE
_POINTS, _WIDTH, _RATE, _SEED = 200, 64, 2e-3, 0
_KERNEL = kernels.gaussian([1.0])

SPECTRAL = "scaled, spectral"
"""The case whose critic has weights divided by their largest singular value, times a factor that is learnt."""
KEPT: dict[str, Penalty] = {
    "nothing": PENALTIES["none"](),
    "witness": PENALTIES["witness"](_KERNEL, weight=1.0),
    "scaled": PENALTIES["scaled"](_KERNEL, weight=10.0, values=False),
}
KEPT[SPECTRAL] = KEPT["scaled"]


@dataclass(frozen=True, kw_only=True)
class WitnessRow(Row):
    """A critic after some steps.

    Attributes:
        penalty: that kept it smooth.
        steps: of the critic.
        mmd: MMD² of both sets, unbiased.
        gradient: the median norm over generated points of the witness function's gradient.
        least_gradient, largest_gradient: the least and the largest norm.
        aligned: the median cosine of that gradient and the direction to the real points' mean.
    """

    penalty: str
    steps: int
    mmd: float
    gradient: float
    least_gradient: float
    largest_gradient: float
    aligned: float


@dataclass(frozen=True)
class Picture:
    """What is drawn of a critic: the witness on a grid, its gradient at generated points, and the kernel of one."""

    title: str
    witness: Tensor  # [GRID, GRID], a row for each second coordinate
    kernel: Tensor  # [GRID, GRID], k(φ(x), φ(·)) of the generated point x nearest to their mean
    real: Tensor  # [n, 2]
    fake: Tensor  # [n, 2]
    gradients: Tensor = field(repr=False)  # [n, 2]


def points(count: int = _POINTS) -> tuple[Tensor, Tensor]:
    """Real points in two spots on the left, generated ones in one on the right, [count, 2] each."""
    random = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(2, count, 2, generator=random) * 0.3
    sides = torch.tensor([-1.2, 1.2]).repeat(count)[:count]
    real = torch.stack([torch.full((count,), -1.2), sides], dim=1) + noise[0]
    return real, torch.tensor([1.2, 0.0]) + noise[1]


def witness(critic: nn.Module, real: Tensor, fake: Tensor, at: Tensor) -> Tensor:
    """E k(φ(x), φ(·)) − E k(φ(G), φ(·)) of `at` [m, 2], as [m]: high where real points are."""
    phi = critic(at)
    found: Tensor = _KERNEL(phi, critic(real)).mean(dim=1) - _KERNEL(phi, critic(fake)).mean(dim=1)
    return found


def train(name: str, steps: tuple[int, ...] = STEPS) -> Iterator[tuple[int, nn.Module]]:
    """The critic of a case of `KEPT` after each number of `steps`."""
    penalty = KEPT[name]
    torch.manual_seed(_SEED)
    real, fake = points()
    hidden = (nn.Linear(2, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH), nn.Tanh())
    critic = nn.Sequential(*hidden, nn.Linear(_WIDTH, 1))
    if name == SPECTRAL:
        normalise_spectrally(list(critic), scaled=True)
    game, optimizer = GAMES["mmd"](_KERNEL), torch.optim.Adam(critic.parameters(), lr=_RATE, betas=(0.5, 0.9))
    for step in range(1, max(steps) + 1):
        of_real, of_fake = critic(torch.cat([real, fake])).chunk(2)
        play = Play(critic, real, fake, of_real, of_fake, lambda count: torch.rand(len(real), count))
        loss = penalty.applied(game.critic_loss(play.phi_real, play.phi_fake), penalty.terms(play))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in steps:
            yield step, critic


def measure(name: str, steps: tuple[int, ...] = STEPS) -> list[tuple[WitnessRow, Picture]]:
    """A row and a picture for each number of steps."""
    found = []
    real, fake = points()
    line = torch.linspace(-SIDE, SIDE, GRID)
    grid = torch.cartesian_prod(line, line).flip(1)
    middle = fake[(fake - fake.mean(dim=0)).norm(dim=1).argmin()]
    for step, critic in train(name, steps):
        critic.eval()  # power iterations stand still
        at = fake.clone().requires_grad_()
        (gradients,) = torch.autograd.grad(witness(critic, real, fake, at).sum(), at)
        with torch.no_grad():
            values = witness(critic, real, fake, grid).reshape(GRID, GRID)
            near = _KERNEL(critic(middle[None]), critic(grid)).reshape(GRID, GRID)
            distance = -GAMES["mmd"](_KERNEL).critic_loss(critic(real), critic(fake)).item()
        norms = gradients.norm(dim=1)
        towards = nn.functional.cosine_similarity(gradients, real.mean(dim=0) - fake, dim=1)
        row = WitnessRow(
            penalty=name,
            steps=step,
            mmd=distance,
            gradient=norms.median().item(),
            least_gradient=norms.min().item(),
            largest_gradient=norms.max().item(),
            aligned=towards.median().item(),
        )
        found.append((row, Picture(f"{name}, {step} steps", values, near, real, fake, gradients)))
        critic.train()
    return found
