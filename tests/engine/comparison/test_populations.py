"""Populations against autograd through running statistics that are written out."""

from __future__ import annotations

import pytest
import torch
from oracle import in_float64, relative_error
from torch import Tensor

from engine.comparison.averagers import BatchMoments, TargetMoments
from engine.comparison.distances import MMD, kernels
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.on_features import OnFeatures
from engine.comparison.populations import (
    MovingCovariance,
    MovingPopulation,
    Population,
    QueuedFeatures,
    QueuedPopulation,
)
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


@pytest.mark.parametrize("correction", [0, 1])
def test_the_correction_is_the_target_s_alone(correction, tiny_extractor, draw_images):
    """Of the first minibatch, which is the whole population."""
    extractor = in_float64(tiny_extractor)
    real, images = draw_images(5).double(), draw_images(4).double()
    with torch.no_grad():
        of_real, x = extractor.features(real), extractor.features(images)
        objective = MomentMatching(extractor, Moments.of(of_real), MovingPopulation(0.9), correction=correction)
        found = objective(images)
    means = (of_real.mean(0) - x.mean(0)).square().sum()
    variances = (of_real.var(0, correction=correction) - x.var(0, correction=0)).square().sum()
    assert relative_error(found, means + variances) <= 1e-10


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range(decay):
    with pytest.raises(InputError) as error:
        MovingPopulation(decay)
    assert error.value.argument == "decay"


def test_empty_queue():
    with pytest.raises(InputError) as error:
        QueuedPopulation(0)
    assert error.value.argument == "minibatches"


class TestQueuedFeatures:
    """The distance sees the last images; the gradient is that of the newest ones' rows."""

    @pytest.mark.parametrize("others", [0, 3, 6])
    def test_is_the_distance_of_the_last_images(self, others):
        distance = MMD(torch.randn(9, 3).double(), kernels.rational_quadratic())
        queued = QueuedFeatures(distance, others, 3, torch.empty(0, dtype=torch.float64))
        drawn = None
        for _ in range(6):
            x = torch.randn(4, 3).double().requires_grad_()
            drawn = x.detach().repeat(2, 1) if drawn is None else drawn
            expected = distance(torch.cat((x, drawn[:others])))
            (gradient,) = torch.autograd.grad(expected, x)
            with torch.no_grad():
                assert relative_error(queued(x), expected) <= 1e-12, "looking changes nothing"
            loss = queued(x)
            (found,) = torch.autograd.grad(loss, x)
            assert relative_error(loss, expected) <= 1e-12
            assert relative_error(found, gradient) <= 1e-12
            drawn = torch.cat((x.detach(), drawn))

    def test_state_goes_through_the_objective(self, tiny_extractor, draw_images):
        extractor = in_float64(tiny_extractor)
        features = sum(tap.shape[0] for tap in extractor.taps)
        distance = MMD(torch.randn(9, features).double(), kernels.rational_quadratic())

        def objective() -> OnFeatures:
            queued = QueuedFeatures(distance, 7, features, torch.empty(0, dtype=torch.float64))
            return OnFeatures(extractor, queued, chunk_size=2)

        first, second = objective(), objective()
        for _ in range(2):
            first(draw_images(5).double().requires_grad_())
        second.load_state_dict(first.state_dict())
        images = draw_images(5).double().requires_grad_()
        assert torch.equal(first(images), second(images))


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_moving_covariance(decay):
    """Against autograd through the weighted mean and covariance of all minibatches so far."""
    target = torch.randn(3, 3).double()

    def distance(mean: Tensor, covariance: Tensor) -> Tensor:
        return mean.square().sum() + (covariance - target).square().sum()

    moving = MovingCovariance(distance, decay, 3, torch.empty(0))
    past: list[Tensor] = []
    for _ in range(STEPS):
        x = (torch.randn(MINIBATCH, 3).double() + 2).requires_grad_()
        batches = [*past, x]
        weights = torch.tensor(decay, dtype=torch.float64) ** torch.arange(len(batches)).flip(0)
        rows, weights = torch.cat(batches), (weights / weights.sum() / MINIBATCH).repeat_interleave(MINIBATCH)
        mean = weights @ rows
        expected = distance(mean, (weights[:, None] * (rows - mean)).T @ (rows - mean))
        (gradient,) = torch.autograd.grad(expected, x)
        with torch.no_grad():
            moving(x)
        loss = moving(x)
        (found,) = torch.autograd.grad(loss, x)
        assert relative_error(loss, expected) <= 1e-10
        assert relative_error(found, gradient) <= 1e-10
        past.append(x.detach())
