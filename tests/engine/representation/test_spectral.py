"""Spectral normalisation of critics: by NumPy's singular values, by PyTorch's own, and over a saved state."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from engine.representation.critics import build_critic
from engine.representation.critics.spectral import SpectralNorm, normalise_spectrally

SHAPES = [(7, 5), (1, 12), (6, 3, 3, 3), (3, 7, 1, 1)]


def largest(weight):
    return np.linalg.svd(weight.detach().flatten(1).numpy(), compute_uv=False)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_largest_singular_value_after_many_iterations(shape):
    weight = torch.randn(shape)
    norm = SpectralNorm(weight, scaled=False)
    for _ in range(2000):
        normalised = norm(weight)
    np.testing.assert_allclose(normalised, weight / largest(weight), rtol=1e-4)


def test_every_layer_of_a_critic():
    critic = build_critic("dcgan", image_size=32, norm="spectral")
    layers = [module for module in critic.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 4
    with torch.no_grad():
        for layer in layers:
            for _ in range(300):
                weight = layer.weight
            np.testing.assert_allclose(largest(weight), 1, rtol=1e-4)
            assert weight.dim() == 2 or weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pytorchs_own(shape):
    """The same weight, u and v: the same numbers, and the same gradient of the weight."""
    layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2])
    layer.double().to(memory_format=torch.channels_last)
    weight = layer.weight.detach().clone().requires_grad_()
    ours, theirs = SpectralNorm(weight.detach(), scaled=False), spectral_norm(layer).eval()
    upstream = torch.randn_like(weight)
    found = ours(weight)
    (gradient,) = torch.autograd.grad(found, weight, upstream)
    parametrization = theirs.parametrizations.weight
    parametrization[0]._u.copy_(ours.u)
    # Theirs has columns in the order (C, H, W), ours in that of the memory.
    columns = weight.movedim(1, -1).flatten(1).shape[1] // shape[1]
    parametrization[0]._v.copy_(ours.v.view(columns, shape[1]).T.flatten())
    torch.testing.assert_close(found, theirs.weight)
    (expected,) = torch.autograd.grad(theirs.weight, parametrization.original, upstream)
    torch.testing.assert_close(gradient, expected)


def test_gradient_is_that_of_the_largest_singular_value():
    """u and v are constants to autograd; where they have converged the derivative is the whole one."""
    weight = torch.randn(5, 4, dtype=torch.float64)
    norm = SpectralNorm(weight, scaled=False)
    for _ in range(3000):
        norm(weight)
    leaf, upstream, direction = weight.clone().requires_grad_(), torch.randn_like(weight), torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(norm.eval()(leaf), leaf, upstream)
    step = 1e-6
    ends = [moved / largest(moved) for moved in (weight + step * direction, weight - step * direction)]
    expected = (upstream * (ends[0] - ends[1])).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scaled", [False, True])
def test_second_derivatives(scaled):
    weight = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    norm = SpectralNorm(weight.detach(), scaled=scaled).eval()
    assert torch.autograd.gradcheck(norm, weight)
    assert torch.autograd.gradgradcheck(norm, weight)


def test_scale_is_learned():
    weight = torch.randn(4, 6)
    norm = SpectralNorm(weight, scaled=True).eval()
    plain = norm(weight).detach()
    with torch.no_grad():
        norm.gamma.fill_(2.5)
    found = norm(weight)
    torch.testing.assert_close(found, 2.5 * plain)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    torch.testing.assert_close(norm.gamma.grad, (upstream * plain).sum())
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2))
    normalise_spectrally(layers, scaled=True)
    assert sum(key.endswith("gamma") for key, _ in layers.named_parameters()) == 2


def train(critic, optimizer, images, steps):
    for step in range(steps):
        optimizer.zero_grad()
        real, fake = critic(images[step : step + 2]), critic(images[step + 2 : step + 4])
        (fake - real).mean().backward()  # both forwards before the backward: u and v of the first must survive
        optimizer.step()


def test_resumed_is_uninterrupted_bit_for_bit():
    images = torch.randn(12, 3, 32, 32)

    def start(seed):
        torch.manual_seed(seed)
        critic = build_critic("dcgan", image_size=32, norm="spectral-scaled")
        return critic, torch.optim.Adam(critic.parameters(), 1e-3)

    whole, optimizer = start(0)
    train(whole, optimizer, images, 2)
    half, other = start(0)
    train(half, other, images, 1)
    resumed, optimizer = start(1)
    resumed.load_state_dict(half.state_dict())
    optimizer.load_state_dict(other.state_dict())
    train(resumed, optimizer, images[1:], 1)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_vectors_move_once_a_forward_in_training_and_never_in_evaluation():
    critic = build_critic("dcgan", image_size=32, norm="spectral")
    before = {key: value.clone() for key, value in critic.named_buffers()}
    assert len(before) == 8
    images = torch.randn(2, 3, 32, 32)
    critic.eval()(images)
    assert all(torch.equal(value, before[key]) for key, value in critic.named_buffers())
    with torch.no_grad():
        critic.train()(images)
    layer = critic.layers[2]
    matrix = layer.parametrizations.weight.original.permute(0, 2, 3, 1).flatten(1)
    v = nn.functional.normalize(before["layers.2.parametrizations.weight.0.u"] @ matrix, dim=0)
    torch.testing.assert_close(layer.parametrizations.weight[0].v, v)


def test_low_precision_leaves_the_norm_alone():
    critic = build_critic("dcgan", image_size=32, norm="spectral").eval()
    weight = critic.layers[0].weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(critic.layers[0].weight, weight)
