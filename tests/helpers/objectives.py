"""Objectives of moment matching beside their oracles, for the tests of everything that an objective runs through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracle import WrittenOut, batch_moments, in_float64, relative_error
from torch import Tensor

from engine.comparison.averagers import AMA, Averager, MovingAverage, NoAverage
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.representation.extractor import Extractor

AVERAGERS: dict[str, tuple[Callable[[], Averager], float]] = {
    "ama": (lambda: AMA(lr=1e-2), 1e-2),
    "ama-authors": (lambda: AMA(lr=1e-2, variant="authors", seed=5), 1e-2),
    "ma": (lambda: MovingAverage(alpha=0.3), 0.3),
    "ma-authors": (lambda: MovingAverage(alpha=0.3, variant="authors"), 0.3),
    "none": (NoAverage, 0.0),
}
MINIBATCH = 11  # leaves a rest in chunks of 2, 3 and 7
Draw = Callable[..., Tensor]


def real_features(extractor: Extractor, draw_images: Draw) -> Tensor:
    """[31, D] float64: features of images that are less varied than those of `draw_images`."""
    with torch.no_grad():
        return in_float64(extractor).features(0.7 * draw_images(31) + 0.1)


def make_pair(
    extractor: Extractor,
    draw_images: Draw,
    name: str,
    *,
    correction: int = 1,
    **options,
) -> tuple[Callable[..., MomentMatching], WrittenOut]:
    """A maker of objectives on `extractor` that take the options of `MomentMatching`, and their oracle."""
    real = real_features(extractor, draw_images)
    make_averager, rate = AVERAGERS[name]

    def make(**more) -> MomentMatching:
        target = Moments.of(real)
        return MomentMatching(extractor, target, make_averager(), correction=correction, **{**options, **more})

    # Where v starts is the engine's choice; test_averagers looks at that choice.
    start = make(kernels="reference").state_dict().get("averager.v")
    target = batch_moments(real, correction)
    oracle = WrittenOut(in_float64(extractor).features, target, name, rate, correction, start)
    return make, oracle


def run_step(objective: MomentMatching, images: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, ∂L/∂images) of one training step."""
    images = images.detach().to(objective.extractor.dtype).requires_grad_()
    loss = objective(images)
    loss.backward()
    assert images.grad is not None
    return loss.detach(), images.grad


def assert_same_state(objective: MomentMatching, oracle: WrittenOut, tolerance: float) -> None:
    state = objective.state_dict()
    for name, expected in oracle.state().items():
        if name == "averager.steps":
            assert int(state[name]) == int(expected)
        else:
            assert relative_error(state[name], expected) <= tolerance, name
