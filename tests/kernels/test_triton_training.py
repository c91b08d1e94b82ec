"""The objective and ten training steps on the Triton kernels, against the same on plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import device_of
from oracle import relative_error
from torch import Tensor, nn

from engine.comparison.averagers import AMA, Averager, MovingAverage, NoAverage
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.representation.extractor import Extractor

DEVICE = device_of("triton")
AVERAGERS: dict[str, Callable[[], Averager]] = {
    "ama": lambda: AMA(lr=1e-2),
    "ama-authors": lambda: AMA(lr=1e-2, variant="authors"),
    "ma": MovingAverage,
    "none": NoAverage,
}


def make(extractor: Extractor, averager: Averager, kernels: str, **options) -> MomentMatching:
    generator = torch.Generator().manual_seed(5)
    features = extractor.num_features
    mean, m2 = torch.rand(2, features, dtype=torch.float64, generator=generator)
    target = Moments(50, mean.to(DEVICE), 20 * m2.to(DEVICE))
    return MomentMatching(extractor, target, averager, kernels=kernels, **options)


@pytest.fixture(scope="module")
def extractor(tiny_extractor: Extractor) -> Extractor:
    return copy.deepcopy(tiny_extractor).to(DEVICE)


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """On CUDA, TF32 and sums in any order would be the larger part of what is compared here."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("averager", AVERAGERS)
def test_a_step_of_the_objective(averager: str, chunk_size: int | None, extractor: Extractor, draw_images) -> None:
    images = draw_images(9, torch.float32).to(DEVICE)
    losses, gradients, states = [], [], []
    for kernels in ("reference", "triton"):
        objective = make(extractor, AVERAGERS[averager](), kernels, chunk_size=chunk_size)
        own = images.clone().requires_grad_()
        loss = objective(own)
        (3 * loss).backward()
        losses.append(loss)
        gradients.append(own.grad)
        states.append(objective.state_dict())
    assert relative_error(losses[1], losses[0]) <= 1e-5
    # Adam's first step only sees signs: where Δ is almost zero they are noise.
    assert relative_error(gradients[1], gradients[0]) <= (1e-3 if averager == "ama" else 1e-5)
    assert states[0].keys() == states[1].keys()
    assert states[1]["averager.steps"] == states[0]["averager.steps"]


def test_ten_training_steps(extractor: Extractor) -> None:
    """Generator, extractor, averager and two Adams: the same losses, and the same weights in the end."""
    histories, weights = [], []
    for kernels in ("reference", "triton"):
        torch.manual_seed(3)
        generator = nn.Sequential(
            nn.Unflatten(1, (6, 1, 1)), nn.ConvTranspose2d(6, 8, 4), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1), nn.Tanh(),
        ).to(DEVICE)  # fmt: skip
        objective = make(extractor, AMA(lr=1e-2, variant="authors"), kernels)
        adam = torch.optim.Adam(generator.parameters(), lr=1e-3, eps=1e-3)
        losses: list[Tensor] = []
        for _ in range(10):
            adam.zero_grad()
            loss = objective(generator(torch.randn(8, 6).to(DEVICE)))
            loss.backward()
            adam.step()
            losses.append(loss.detach())
        histories.append(torch.stack(losses))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in generator.parameters()]))
    assert not torch.equal(histories[0][0], histories[0][-1])
    assert relative_error(histories[1], histories[0]) <= 1e-5
    assert relative_error(weights[1], weights[0]) <= 1e-5
