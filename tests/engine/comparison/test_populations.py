"""Populations against autograd through running statistics that are written out."""

from __future__ import annotations

import pytest
import torch
from oracle import in_float64, relative_error
from torch import Tensor

from engine.comparison.averagers import BatchMoments, TargetMoments
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.populations import MovingPopulation, Population, QueuedPopulation
from engine.support.errors import InputError
from kernels import reference

FEATURES, MINIBATCH, STEPS = 37, 6, 20
POPULATIONS = [
    pytest.param(lambda: MovingPopulation(0.9), id="ema"),
    pytest.param(lambda: MovingPopulation(0.0), id="ema 0"),
    pytest.param(lambda: MovingPopulation(0.999), id="ema .999"),
    pytest.param(lambda: QueuedPopulation(4), id="queue"),
    pytest.param(lambda: QueuedPopulation(1), id="queue of 1"),
    pytest.param(lambda: QueuedPopulation(50), id="queue never full"),
]


class WrittenOut:
    """Weights of all minibatches so far, and the raw moments under these weights; the newest one's with a graph."""

    def __init__(self, population: Population, target: Tensor, weight: Tensor | None = None):
        self.population, self.target, self.weight = population, target, weight
        self.past: list[Tensor] = []

    def loss(self, x: Tensor) -> Tensor:
        batches = [*self.past, x]
        if isinstance(self.population, MovingPopulation):
            ages = torch.arange(len(batches)).flip(0)
            weights = torch.tensor(self.population.decay, dtype=torch.float64) ** ages
        else:
            batches = batches[-self.population.minibatches :]
            weights = torch.ones(len(batches)).double()
        weights = weights / weights.sum()
        mean = sum(weight * batch.mean(dim=0) for weight, batch in zip(weights, batches, strict=True))
        square = sum(weight * batch.square().mean(dim=0) for weight, batch in zip(weights, batches, strict=True))
        delta = torch.stack((mean, square - mean.square())) - self.target
        if self.weight is not None:
            delta = delta * torch.stack((self.weight, self.weight.square()))
        self.past.append(x.detach())
        return delta.square().sum()


def step(population: Population, x: Tensor, target: Tensor, advance: bool = True, weight: Tensor | None = None):
    m2, mean = torch.var_mean(x, dim=0, correction=0)
    batch = BatchMoments(len(x), mean, m2 * len(x))
    return population.step(reference, batch, TargetMoments(*target), correction=1, advance=advance, weight=weight)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("make", POPULATIONS)
def test_gradient_is_autograd_s_through_the_written_out_population(make, weighted):
    """Twenty steps, of which the state is saved and restored in the middle."""
    population = make()
    population.reset(FEATURES, dtype=torch.float64)
    target = torch.stack((torch.randn(FEATURES), torch.rand(FEATURES))).double()
    weight = torch.rand(FEATURES).double() if weighted else None
    oracle = WrittenOut(population, target, weight)
    for number in range(STEPS):
        x = (torch.randn(MINIBATCH, FEATURES).double() + number / 10).requires_grad_()
        expected = oracle.loss(x)
        (gradient,) = torch.autograd.grad(expected, x)
        x = x.detach()
        before = step(population, x, target, advance=False, weight=weight)
        found = step(population, x, target, weight=weight)
        assert relative_error(found.a + found.b * x, gradient) <= 1e-10
        assert relative_error(found.sums[4], expected.detach()) <= 1e-10
        assert torch.equal(before.a, found.a), "looking changes nothing"
        if number == STEPS // 2:
            resumed = make()
            resumed.reset(FEATURES, dtype=torch.float64)
            for name in (*population.state_names, "steps"):
                getattr(resumed, name).copy_(getattr(population, name))
            population = resumed


@pytest.mark.parametrize("make", POPULATIONS[::3])
def test_state_goes_through_the_objective(make, tiny_extractor, draw_images):
    """Of any number of rows; in the public order."""
    extractor = in_float64(tiny_extractor)
    with torch.no_grad():
        target = Moments.of(extractor.features(draw_images(9).double()))
    images = draw_images(5).double()
    first, second = (MomentMatching(extractor, target, make()) for _ in range(2))
    for _ in range(3):
        first(images.requires_grad_())
    second.load_state_dict(first.state_dict())
    images.grad = None
    first(images).backward()
    expected = images.grad
    images.grad = None
    second(images).backward()
    assert torch.equal(images.grad, expected)
    other = MomentMatching(extractor, target, QueuedPopulation(3))
    with pytest.raises(InputError) as error:
        other.load_state_dict(first.state_dict())
    assert error.value.argument == "state"


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range(decay):
    with pytest.raises(InputError) as error:
        MovingPopulation(decay)
    assert error.value.argument == "decay"


def test_empty_queue():
    with pytest.raises(InputError) as error:
        QueuedPopulation(0)
    assert error.value.argument == "minibatches"
