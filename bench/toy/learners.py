"""Every method on points in the plane: a small generator, and a small critic or none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.rows import Row
from bench.toy.networks import NZ, WIDTH, Frozen, PlaneAutoencoder, PlaneCritic, PlaneGenerator
from bench.toy.planes import PARTS, PLANES, Drawing, Plane, judge
from engine.comparison.averagers import AMA, BatchMoments, TargetMoments
from engine.comparison.distances import (
    Frechet,
    drifting,
    energy_distance,
    kernels,
    mmd,
    sinkhorn,
    sliced_wasserstein,
)
from engine.comparison.games import GAMES
from engine.comparison.games.penalties import PENALTIES
from engine.generation.networks import Generator
from engine.generation.priors import Gaussian, Noise
from engine.methods.adversarial import Adversarial, CriticSteps
from engine.methods.denoising import DenoisingFeatureMatching
from engine.methods.gradient_step import GradientStep
from engine.methods.learned_moments import LearnedMoments, MomentSchedule
from engine.representation.critics import Critic
from engine.representation.critics.denoiser import Denoiser
from engine.representation.critics.spectral import normalise_spectrally
from kernels import reference
from pipelines import Batch

BATCH = 256
SAMPLES = 2000
_WIDTHS = kernels.gaussian([0.1, 0.3, 1.0])  # of points that are a few units apart
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LearnerRow(Row):
    """One method on one law.

    Attributes:
        law: as in `planes.PLANES`.
        name: of the learner.
        settings: in words.
        steps, minibatch: of the generator.
        near, covered, distance: see `planes.Drawing`; the distance is None if it isn't finite.
    """

    law: str
    name: str
    settings: str
    steps: int
    minibatch: int
    near: float
    covered: int
    distance: float | None = None


@dataclass(frozen=True)
class Player:
    """An adversarial learner.

    Attributes:
        game: what makes it.
        penalties: by name, with their arguments.
        outputs: of the critic; 0 for an autoencoder.
        norm: of the critic's weights, as --critic-norm has it.
        critic_steps, lr, optimizer: see `Adversarial`.
        steps: of the generator.
        own: for another method than `Adversarial`, what makes it of the networks and options.
    """

    game: Callable[[], Any]
    penalties: Mapping[str, Mapping[str, Any]]
    outputs: int = 1
    norm: str = "none"
    critic_steps: int = 1
    lr: float = 1e-3
    optimizer: str = "adam"
    steps: int = 2000
    own: Callable[..., Adversarial] | None = None

    @property
    def settings(self) -> str:
        """In words."""
        added = [*self.penalties, *([f"norm {self.norm}"] if self.norm != "none" else [])]
        turns = [f"{self.critic_steps} critic steps"] if self.critic_steps > 1 else []
        return ", ".join([*added, *turns, f"{self.optimizer} at {self.lr:g}"])


def _denoising(generator: Generator, critic: PlaneCritic, **options: Any) -> Adversarial:
    denoiser = Denoiser(WIDTH, WIDTH, layers=4)
    return DenoisingFeatureMatching(generator, critic, denoiser, Gaussian(NZ), deviation=0.5, **options)


def _moments(generator: Generator, critic: PlaneCritic, **options: Any) -> Adversarial:
    schedule = MomentSchedule(every=50, steps=50, images=2_000)
    return LearnedMoments(generator, critic, Gaussian(NZ), schedule, penalty=0.1, scale=1.0, **options)


_RQ, _ONE = kernels.rational_quadratic(), kernels.gaussian([1.0])
_CLIP = {"clip": {"limit": 0.1}}
PLAYERS: dict[str, Player] = {
    "minimax": Player(GAMES["minimax"], {}),
    "nonsaturating": Player(GAMES["nonsaturating"], {}),
    "nonsaturating + R1": Player(GAMES["nonsaturating"], {"r1": {"weight": 0.1}}),
    "boundary-seeking": Player(GAMES["boundary-seeking"], {}),
    "least squares": Player(GAMES["least-squares"], {}),
    "hinge": Player(GAMES["hinge"], {}, norm="spectral", critic_steps=3, steps=1000),
    "WGAN": Player(GAMES["wasserstein"], _CLIP, critic_steps=5, optimizer="rmsprop", lr=5e-4, steps=1000),
    "WGAN-GP": Player(GAMES["wasserstein"], {"gradient": {"weight": 0.1}}, critic_steps=5, steps=800),
    "BEGAN": Player(GAMES["began"], {}, outputs=0),
    "Fisher GAN": Player(partial(GAMES["fisher"], rho=1e-3), {}, critic_steps=2, steps=1000),
    "McGAN, mean": Player(GAMES["mcgan-mean"], _CLIP, 16, critic_steps=5, optimizer="rmsprop", lr=5e-4, steps=800),
    "McGAN, covariance": Player(
        partial(GAMES["mcgan-covariance"], components=8),
        _CLIP,
        16,
        critic_steps=5,
        optimizer="rmsprop",
        lr=5e-4,
        steps=600,
    ),
    "feature matching": Player(GAMES["feature-matching"], {}),
    "MMD-GAN, Li": Player(
        GAMES["root-mmd"], {**_CLIP, "autoencode": {}}, 4, critic_steps=5, optimizer="rmsprop", lr=5e-4, steps=500
    ),
    "MMD-GAN, rq": Player(
        partial(GAMES["mmd"], _RQ), {"witness": {"kernel": _RQ}, "activations": {}}, 4, critic_steps=3, steps=500
    ),
    "SMMD": Player(
        partial(GAMES["mmd"], _ONE), {"scaled": {"kernel": _ONE, "weight": 1.0}}, 1, critic_steps=3, steps=700
    ),
    "SN-SMMD": Player(
        partial(GAMES["mmd"], _ONE),
        {"scaled": {"kernel": _ONE, "weight": 1.0}},
        norm="spectral-scaled",
        critic_steps=3,
        steps=700,
    ),
    "DFM": Player(GAMES["nonsaturating"], {}, own=_denoising),
    "MoLM": Player(GAMES["nonsaturating"], {}, own=_moments),
}


def _root_mmd(x: Tensor, y: Tensor) -> Tensor:
    return (mmd(x, y, _WIDTHS).clamp_min(0) + 1e-6).sqrt()


DISTANCES: dict[str, tuple[Loss, str]] = {
    "MMD": (partial(mmd, kernel=_WIDTHS), "Gaussians, σ = 0.1, 0.3, 1"),
    "GMMN": (_root_mmd, "√MMD², the same"),
    "energy": (energy_distance, ""),
    "Sinkhorn": (partial(sinkhorn, epsilon=0.02, iterations=20, tolerance=None), "ε = 0.02, 20 iterations"),
    "sliced W": (lambda x, y: sliced_wasserstein(x, y, 32), "32 directions"),
    "drifting": (drifting, ""),
}
"""Compared on points as they are, each with a fresh minibatch."""
FEATURES = ("GFMN, random", "GFMN, trained", "Fréchet, points", "Fréchet, trained")
"""Compared by moments of many real points, of features of a frozen network or of the points themselves."""
_DISTANCE_STEPS, _DISTANCE_RATE, _CLASSIFIER_STEPS = 2000, 2e-3, 500
_FEWER_STEPS = {"Sinkhorn": 500, "drifting": 1000, "Fréchet, trained": 800}  # they take longer
_TARGETS = 20_000
LEARNERS = (*PLAYERS, *DISTANCES, *FEATURES)


class MomentLoss:
    """GFMN: mean and variance of every feature against those of many real points, smoothed by AMA.

    A scalar whose value means nothing: its gradient is that of L = Σ v·Δ (docs/method.md, identity 1).
    """

    def __init__(self, features: nn.Module, plane: Plane, random: torch.Generator):
        self.features = features
        with torch.no_grad():
            variance, mean = torch.var_mean(features(plane.draw(_TARGETS, random)), dim=0)
        self.target, self.averager = TargetMoments(mean, variance), AMA(1e-2)
        self.averager.reset(len(mean))

    def __call__(self, points: Tensor, real: Tensor) -> Tensor:
        x = self.features(points)
        variance, mean = torch.var_mean(x.detach(), dim=0, correction=0)
        batch = BatchMoments(len(x), mean, len(x) * variance)
        found = self.averager.step(reference, batch, self.target, correction=1)
        return ((found.a + found.b * x.detach()) * x).sum()


def measure(law: str, name: str, steps: int | None = None, seed: int = 0) -> tuple[LearnerRow, Tensor]:
    """Train, draw and judge: a row, and the points [SAMPLES, 2]."""
    plane = PLANES[law]()
    torch.manual_seed(seed)
    generator, random = PlaneGenerator(), torch.Generator().manual_seed(seed + 1)
    if name in PLAYERS:
        player = PLAYERS[name]
        settings, count = player.settings, steps or player.steps
        _play(player, generator, plane, random, count)
    else:
        count = steps or _FEWER_STEPS.get(name, _DISTANCE_STEPS)
        loss, settings = _loss(name, plane, random, min(count, _CLASSIFIER_STEPS))
        _descend(loss, generator, plane, random, count)
    with torch.no_grad():
        points = generator(Gaussian(NZ).draw(SAMPLES, seed + 2))
    return _row(law, name, settings, count, judge(plane, points)), points


def truth(law: str) -> tuple[LearnerRow, Tensor]:
    """The row of real points, which is the best that can be had."""
    plane = PLANES[law]()
    points = plane.draw(SAMPLES, torch.Generator().manual_seed(0))
    return _row(law, "real", "", 0, judge(plane, points)), points


def _row(law: str, name: str, settings: str, steps: int, drawing: Drawing) -> LearnerRow:
    return LearnerRow(
        law=law,
        name=name,
        settings=settings,
        steps=steps,
        minibatch=BATCH,
        near=drawing.near,
        covered=drawing.covered,
        distance=drawing.distance if drawing.distance < float("inf") else None,
    )


def _play(player: Player, generator: Generator, plane: Plane, random: torch.Generator, steps: int) -> None:
    decodes = "autoencode" in player.penalties
    critic: Critic = PlaneCritic(player.outputs, decodes) if player.outputs else PlaneAutoencoder()
    if player.norm != "none":
        normalise_spectrally(list(critic.modules()), scaled=player.norm == "spectral-scaled")
    options: dict[str, Any] = {
        "batch_size": BATCH,
        "lr": player.lr,
        "betas": (0.5, 0.9),
        "optimizer": player.optimizer,
    }
    if player.own is not None:
        method = player.own(generator, critic, **options)
    else:
        penalties = [PENALTIES[name](**player.penalties[name]) for name in PENALTIES if name in player.penalties]
        options["critic_steps"] = CriticSteps(usual=player.critic_steps)
        method = Adversarial(generator, critic, Gaussian(NZ), player.game(), penalties, **options)
    noise, batches = Noise(int(torch.randint(2**31, (), generator=random))), _batches(plane, random)
    for step in range(steps):
        for optimizer in method.optimizers.values():
            _set_rate(optimizer, player.lr, step / steps)
        method.step(batches, noise)


def _batches(plane: Plane, random: torch.Generator) -> Iterator[Batch]:
    for number in itertools.count():
        indices = torch.arange(BATCH) + number * BATCH
        yield Batch(plane.draw(BATCH, random), indices)


def _descend(loss: Loss, generator: Generator, plane: Plane, random: torch.Generator, steps: int) -> None:
    prior, update = Gaussian(NZ), GradientStep(generator, lr=_DISTANCE_RATE, betas=(0.5, 0.9))
    for step in range(steps):
        _set_rate(update.optimizer, _DISTANCE_RATE, step / steps)
        update.take(loss(generator(prior.sample(BATCH, random)), plane.draw(BATCH, random)))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, done: float) -> None:
    """Constant, and over the last half in a line to 0."""
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, 2 * (1 - done))


def _loss(name: str, plane: Plane, random: torch.Generator, steps: int) -> tuple[Loss, str]:
    """What a generator without a critic minimises, and the settings in words; a classifier takes `steps` steps."""
    if name in DISTANCES:
        return DISTANCES[name]
    if name == "Fréchet, points":
        of_points = Frechet.of(plane.draw(_TARGETS, random))
        return lambda x, y: of_points(x), ""
    features, trained = Frozen(), name.endswith("trained")
    if trained:
        _classify(features, plane, random, steps)
    features.requires_grad_(False)
    settings = f"{2 * WIDTH} features of a {'classifier of the parts' if trained else 'random network'}"
    if name.startswith("GFMN"):
        return MomentLoss(features, plane, random), settings
    with torch.no_grad():
        distance = Frechet.of(features(plane.draw(_TARGETS, random)))
    return lambda x, y: distance(features(x)), settings


def _classify(features: Frozen, plane: Plane, random: torch.Generator, steps: int) -> None:
    """Train the features to tell the law's parts apart."""
    head = nn.Linear(2 * WIDTH, PARTS)
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(plane.centres), (BATCH,), generator=random)
        points = plane.centres[chosen] + plane.deviation * torch.randn(BATCH, 2, generator=random)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features(points)), plane.part[chosen]).backward()
        optimizer.step()
