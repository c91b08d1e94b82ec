"""--feature-scale target-deviation against autograd through explicitly scaled features."""

import pytest
import torch
from helpers.visiting import enliven
from oracle import WrittenOut, batch_moments, in_float64, relative_error, tapped
from torch import nn

from engine.comparison.averagers import AMA, MovingAverage, NoAverage
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching, feature_weights

AVERAGERS = {
    "ama": (lambda: AMA(lr=1e-2), 1e-2),
    "ama-authors": (lambda: AMA(lr=1e-2, variant="authors", seed=5), 1e-2),
    "ma": (lambda: MovingAverage(alpha=0.3), 0.3),
    "ma-authors": (lambda: MovingAverage(alpha=0.3, variant="authors"), 0.3),
    "none": (NoAverage, 0.0),
}


@pytest.fixture(scope="module")
def extractor():
    """Taps with and without a gradient of their own, whose features differ in scale."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 7, 1), nn.GELU()]
    network = enliven(nn.Sequential(*layers))
    network[4].weight.data *= 30
    return in_float64(tapped(network, 8))


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("name", AVERAGERS)
def test_five_steps_against_scaled_features(extractor, name, correction, kernels, draw_images):
    make_averager, rate = AVERAGERS[name]
    with torch.no_grad():
        real = extractor.features(draw_images(23))
    real[:, 3] = 0.25  # a feature that never varies in the target
    deviation = real.std(dim=0, correction=correction)
    weights = 1 / (deviation + 0.05 * deviation.mean())
    objectives = [
        MomentMatching(
            extractor,
            Moments.of(real),
            make_averager(),
            correction=correction,
            kernels=kernels,
            chunk_size=chunk_size,
            weights=feature_weights(Moments.of(real), correction),
        )
        for chunk_size in (None, 4)
    ]
    start = objectives[0].state_dict().get("averager.v")
    oracle = WrittenOut(
        lambda images: weights * extractor.features(images),
        batch_moments(weights * real, correction),
        name,
        rate,
        correction,
        start,
    )
    for _ in range(5):
        images = draw_images(9)
        expected_loss, expected = oracle.gradient(images)
        for objective in objectives:
            given = images.clone().requires_grad_()
            loss = objective(given)
            loss.backward()
            assert relative_error(loss, expected_loss) <= 1e-10
            assert relative_error(given.grad, expected) <= 1e-10
    for key, value in oracle.state().items():
        if name == "ma-authors":  # it averages the features' own moments
            value = value / torch.stack((weights, weights.square()))
        assert relative_error(objectives[0].state_dict()[key].double(), value.double()) <= 1e-10


def test_none_is_the_paper(extractor, draw_images):
    with torch.no_grad():
        target = Moments.of(extractor.features(draw_images(9)))
    images = draw_images(5)
    plain, none, scaled = (
        MomentMatching(extractor, target, AMA(lr=1e-2), kernels="reference", weights=weights)(images)
        for weights in (None, torch.ones(extractor.num_features), feature_weights(target))
    )
    assert plain == none != scaled


def test_bad_input(extractor, draw_images):
    with torch.no_grad():
        features = extractor.features(draw_images(4))
    with pytest.raises(ValueError, match="weights: must be"):
        MomentMatching(extractor, Moments.of(features), AMA(), weights=torch.ones(extractor.num_features - 1))
    with pytest.raises(ValueError, match="no feature of the target varies"):
        feature_weights(Moments.of(features[:1].expand(3, -1)))
