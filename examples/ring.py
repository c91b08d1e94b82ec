"""A ring of eight Gaussians in the plane, matched twice from the same start: by kernel MMD, and by moments.

    python examples/ring.py [ring.png]

A few seconds on one core. There are no images here, and so no extractor: this is `engine.comparison` alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from engine import MovingAverage
from engine.comparison.averagers import BatchMoments, TargetMoments
from engine.comparison.distances import MMD, kernels, mmd
from kernels import reference

MODES, RADIUS, DEVIATION = 8, 2.0, 0.15
NZ, BATCH = 4, 256
KERNEL = kernels.gaussian(bandwidths=(0.3, 1.0))  # one width for the spots, one for the ring
ANGLES = torch.arange(MODES) * (2 * math.pi / MODES)
CENTRES = RADIUS * torch.stack((ANGLES.cos(), ANGLES.sin()), dim=1)


def draw_real(count: int) -> Tensor:
    """[count, 2]; every Gaussian has the same share."""
    return CENTRES[torch.arange(count) % MODES] + DEVIATION * torch.randn(count, 2)


class RandomFeatureMoments:
    """GFMN in small: mean and variance of fixed random features, their differences smoothed by an averager.

    The features are cos(Wx + b), with Gaussian W of deviation 1/σ. The more there are of them, the nearer is the
    squared distance of two sets' means to MMD² under the Gaussian kernel of width σ, up to a factor (Rahimi & Recht
    2007). So both ways want the same, but this one remembers nothing of the real points besides two numbers a feature.
    """

    def __init__(self, real: Tensor, features: int = 512):
        widths = torch.tensor(KERNEL.bandwidths).repeat(features // len(KERNEL.bandwidths))
        self.weight = torch.randn(2, len(widths)) / widths
        self.bias = 2 * math.pi * torch.rand(len(widths))
        variance, mean = torch.var_mean(self.features(real), dim=0)
        self.target = TargetMoments(mean, variance)
        self.averager = MovingAverage(alpha=0.1)
        self.averager.reset(len(widths))

    def features(self, points: Tensor) -> Tensor:
        """[n, F]."""
        return torch.cos(points @ self.weight + self.bias)

    def __call__(self, points: Tensor) -> Tensor:
        """A scalar with the gradient of L = Σ v·Δ; its value means nothing."""
        x = self.features(points)
        variance, mean = torch.var_mean(x.detach(), dim=0, correction=0)
        batch = BatchMoments(len(x), mean, len(x) * variance)
        found = self.averager.step(reference, batch, self.target, correction=1)
        # Two coefficients per feature are all that backward needs: ∂L/∂x = a + b·x (docs/method.md, identity 1).
        return ((found.a + found.b * x.detach()) * x).sum()


def train(loss: Callable[[Tensor], Tensor], steps: int) -> list[Tensor]:
    """2,000 points each from the generator before, early in, and after a training of `steps` steps."""
    torch.manual_seed(1)
    generator = nn.Sequential(nn.Linear(NZ, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(generator.parameters(), lr=5e-3, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    z, snapshots = torch.randn(2000, NZ), []
    for step in range(steps + 1):
        if step in (0, steps // 8, steps):
            snapshots.append(generator(z).detach())
        optimizer.zero_grad()
        loss(generator(torch.randn(BATCH, NZ))).backward()
        optimizer.step()
        schedule.step()
    return snapshots


def main() -> None:
    """Train both ways, print how well each did, draw the picture."""
    parser = argparse.ArgumentParser(description="Match a ring of Gaussians by kernel MMD and by moments.")
    parser.add_argument("picture", nargs="?", default="ring.png", help="PNG file to write (default: ring.png)")
    parser.add_argument("--steps", type=int, default=800, help="training steps (default: 800)")
    arguments = parser.parse_args()
    if arguments.steps < 8:
        parser.error("--steps: at least 8, as the picture shows an eighth of them")
    torch.manual_seed(0)
    real, unseen = draw_real(1024), draw_real(2000)
    print(f"MMD² between two sets of real points: {mmd(real, unseen, KERNEL):.5f}")
    losses: dict[str, Callable[[Tensor], Tensor]] = {"MMD": MMD(real, KERNEL), "moments": RandomFeatureMoments(real)}
    figure = Figure(figsize=(12, 6), layout="constrained")
    for row, (name, loss) in zip(figure.subplots(2, 4), losses.items()):
        before, early, after = train(loss, arguments.steps)
        first, last = (mmd(points, unseen, KERNEL) for points in (before, after))
        # A point belongs to a spot if it lies within three deviations of the centre.
        spots = (torch.cdist(after, CENTRES) < 3 * DEVIATION).sum(dim=0)
        print(f"{name}: MMD² from {first:.5f} to {last:.5f}, points in each spot {spots.tolist()} of {len(after)}")
        titles = ("real", f"{name}: start", f"step {arguments.steps // 8}", f"step {arguments.steps}")
        for axes, points, title in zip(row, (unseen, before, early, after), titles):
            axes.scatter(*points.T, s=2, color="tab:gray" if points is unseen else "tab:blue")
            axes.set(title=title, xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
    figure.savefig(arguments.picture)
    print(f"picture: {arguments.picture}")


if __name__ == "__main__":
    main()
