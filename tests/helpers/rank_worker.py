"""What `tests/engine/training/test_ranks.py` runs in every process of a job: `rank_worker.py FOLDER CASE…`.

Trains a few float64 steps on a rank's share of every minibatch, and saves what one process can be compared with.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from engine.comparison import moment_matching
from engine.comparison.averagers import AMA, Averager, MovingAverage, NoAverage
from engine.comparison.distances import MMD, Frechet, LandmarkMMD, Sinkhorn, drifting, kernels
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.on_features import Discrepancy, OnFeatures
from engine.comparison.populations import MovingCovariance, MovingPopulation, QueuedFeatures, QueuedPopulation
from engine.generation import networks
from engine.generation.networks import build_generator
from engine.generation.priors import Gaussian, Noise
from engine.methods.matching import Matching
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.training.ranks import Ranks

STEPS, NZ, SIZE = 10, 6, 32
AVERAGERS: dict[str, Averager] = {
    "ama": AMA(lr=1e-2),
    "ama-authors": AMA(lr=1e-2, variant="authors"),
    "ma": MovingAverage(alpha=0.2),
    "ma-authors": MovingAverage(alpha=0.2, variant="authors"),
    "none": NoAverage(),
    "ema": MovingPopulation(0.7),
    "queue": QueuedPopulation(3),
}


def root_of(distance: Discrepancy) -> Discrepancy:
    """As GMMN compares."""
    return lambda x: (distance(x) + 1e-8).sqrt()


DISTANCES: dict[str, Callable[[Tensor], Discrepancy]] = {
    "mmd": lambda real: MMD(real, kernels.rational_quadratic()),
    "landmarks": lambda real: LandmarkMMD(real, kernels.rational_quadratic(), 5),
    "gmmn": lambda real: root_of(MMD(real, kernels.gaussian((0.5, 1.0)))),
    "frechet": Frechet.of,
    "frechet-queue": lambda real: QueuedFeatures(Frechet.of(real), 9, real.shape[1], real),
    "frechet-ema": lambda real: MovingCovariance(Frechet.of(real).of_moments, 0.7, real.shape[1], real),
    "sinkhorn": lambda real: Sinkhorn(real, 0.2, iterations=40, tolerance=None),
    "drifting": lambda real: lambda x: drifting(x, real),
}
# Name → (averager or distance, minibatch, options of the objective, recompute the generator).
CASES: dict[str, tuple[str, int, dict, bool]] = {
    **{name: (name, 8, {}, False) for name in AVERAGERS},
    "odd": ("ma", 7, {}, False),
    "chunks": ("ma", 7, {"chunk_size": 2}, False),
    "groups": ("ma", 7, {"chunk_size": 2}, False),
    "stages": ("none", 7, {"recompute": "stages"}, True),
    **{name: (name, 7, {"chunk_size": 2}, False) for name in DISTANCES},
    "clipped": ("ma", 7, {}, False),
    "skipped": ("ma", 7, {}, False),
}
_OF_METHOD: dict[str, dict[str, Any]] = {"clipped": {"clip_grad": 1e-3, "optimizer": "adamw"}}


class Small(nn.Module):
    """Shortcuts, a pooling and a stride; 32×32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third, self.pool = nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(torch.relu(self.first(x)))
        y = torch.relu(self.second(y) + y)
        return torch.relu(self.third(y))


def extractor() -> Extractor:
    torch.manual_seed(3)
    return build_extractor("own", module=Small().eval(), image_size=SIZE).double()


def make(case: str, ranks: Ranks) -> Matching:
    """A method whose everything is float64; the same on every rank."""
    kind, minibatch, options, recompute = CASES[case]
    # So that the moments of every tap travel by themselves; networks as small as this one are a single group.
    moment_matching._LEAST_TOGETHER = 1 if case == "groups" else 1 << 17
    network = extractor()
    torch.manual_seed(5)
    real = torch.rand(12, 3, SIZE, SIZE, dtype=torch.float64) * 2 - 1
    features = network.features(real)
    options = {"kernels": "reference", "ranks": ranks, **options}
    if kind in DISTANCES:
        pooled = torch.cat([part.unflatten(1, tap.shape).mean(dim=(2, 3)) for part, tap in zip(
            features.split([tap.num_features for tap in network.taps], dim=1), network.taps, strict=True
        )], dim=1)  # fmt: skip
        objective = OnFeatures(network, DISTANCES[kind](pooled), **options)
    else:
        objective = MomentMatching(network, Moments.of(features), AVERAGERS[kind], **options)
    with patch.object(networks, "_BASE_WIDTH", 8):  # an eighth of its width, and a fiftieth of its time
        generator = build_generator("dcgan", image_size=SIZE, nz=NZ).double()
    method = Matching(
        generator, Double(NZ), objective, batch_size=minibatch, lr=1e-3, recompute_generator=recompute, ranks=ranks,
        **_OF_METHOD.get(case, {}),
    )  # fmt: skip
    if case == "skipped" and ranks.rank == ranks.size - 1:  # what one rank finds is what all of them skip
        steps = itertools.count()
        next(iter(generator.parameters())).register_hook(
            lambda gradient: gradient / 0 if next(steps) in (3, 5, 6) else gradient
        )
    return method


class Double(Gaussian):
    """Gaussian z in float64."""

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        return super().sample(count, random).double()


def run(case: str, ranks: Ranks) -> dict[str, Tensor]:
    """Loss and gradients of the first step, losses of all, and everything that was learnt."""
    method, noise = make(case, ranks), Noise(11)
    found, losses = {}, []
    for step in range(STEPS):
        losses.append(method.step(None, noise)["loss"])
        if step == 0:
            found |= {f"gradient.{name}": w.grad.clone() for name, w in method.generator.named_parameters()}
    found |= {"losses": torch.stack(losses)}
    found |= {f"generator.{name}": value for name, value in method.generator.state_dict().items()}
    return found | {f"state.{name}": value for name, value in method.state_dict().items()}


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join()
    for case in cases:
        torch.save(run(case, ranks), folder / f"{case}.{ranks.size}.{ranks.rank}.pt")
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
