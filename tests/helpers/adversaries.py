"""Helpers: a generator and a critic of a few hundred numbers, float64, and real images for their steps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.generation.batch_norm import BatchNorm2d
from engine.generation.networks import Generator, GeneratorSpec
from engine.generation.priors import Gaussian
from engine.representation.critics import CriticSpec
from engine.representation.critics.critic import LinearCritic
from engine.training.ranks import ALONE, Ranks
from pipelines import Batch

SIZE, NZ, HIDDEN, CLASSES = 8, 4, 6, 3
PIXELS = 3 * SIZE * SIZE
_ONE_AT_A_TIME = threading.Lock()


class DoubleGaussian(Gaussian):
    """Gaussian z in float64."""

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        return super().sample(count, random).double()


class TinyGenerator(Generator):
    """A linear layer, BatchNorm and tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = GeneratorSpec("tiny", SIZE, NZ)
        self.layers = nn.Sequential(nn.Linear(NZ, PIXELS), nn.Unflatten(1, (3, SIZE, SIZE)), BatchNorm2d(3), nn.Tanh())

    def stages(self) -> list[nn.Sequential]:
        return [self.layers]


class TinyCritic(LinearCritic):
    """A linear layer and tanh, a linear layer; and a decoder."""

    def __init__(self, outputs: int, *, norm: str = "none", minibatch_discrimination: bool = False) -> None:
        super().__init__(CriticSpec("tiny", SIZE, outputs, norm, minibatch_discrimination), HIDDEN)
        self.norm = nn.BatchNorm2d(3) if norm == "batch" else nn.Identity()
        self.first, self.decoder = nn.Linear(PIXELS, HIDDEN), nn.Linear(outputs, PIXELS)
        self.activation = nn.Tanh()

    def features(self, images: Tensor) -> Tensor:
        return self.activation(self.first(self.norm(images).flatten(1)))

    @property
    def beside(self) -> list[nn.Module]:
        return [self.decoder]

    def decode(self, outputs: Tensor) -> Tensor:
        return torch.tanh(self.decoder(outputs)).view(-1, 3, SIZE, SIZE)


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Inside, torch's own random numbers are those of `seed`, and no other thread's (ranks may be threads)."""
    with _ONE_AT_A_TIME, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def tiny_networks(outputs: int, **options: object) -> tuple[TinyGenerator, TinyCritic]:
    """Both, the same at every call."""
    with drawn_from(4):
        generator, critic = TinyGenerator().double(), TinyCritic(outputs, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        critic.last.weight.mul_(3)  # so that not all outputs are small
    return generator, critic


def real_batches(count: int, ranks: Ranks = ALONE) -> Iterator[Batch]:
    """Minibatches without end of `count` random images, of which a rank has its share; the same at every call."""
    random, first = torch.Generator().manual_seed(8), 0
    while True:
        images = torch.rand(count, 3, SIZE, SIZE, generator=random, dtype=torch.float64) * 2 - 1
        own = ranks.share(count)
        yield Batch(images[own], torch.arange(first, first + count)[own])
        first += count


def real_labels(count: int = 100) -> Tensor:
    """Class numbers of these images."""
    return torch.arange(count) * 7 % CLASSES
