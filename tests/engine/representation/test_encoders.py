"""Encoders mirror the generators, and are extractors' networks in another role."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.generation.networks import build_generator
from engine.representation.encoders import ENCODERS, Autoencoder, CodeCritic, Encoder, build_encoder
from engine.support.errors import InputError


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_shapes(name: str, gaussian: bool) -> None:
    encoder = build_encoder(name, image_size=32, nz=5, gaussian=gaussian).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert encoder(images).shape == (2, 5)
    if gaussian:
        mean, log_variance = encoder.law(images)
        assert torch.equal(mean, encoder(images))
        assert log_variance.shape == (2, 5)
        assert not torch.equal(mean, log_variance)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, 32) for name in ENCODERS), *((name, size) for name in ("dcgan", "resnet") for size in (64, 128))],
)
def test_codes_start_small(name: str, size: int, trained: bool) -> None:
    """So that tanh has a slope, and the variances of a Gaussian are of the order of 1."""
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=size, nz=20, gaussian=True).train(trained)
    images = nn.functional.interpolate(torch.rand(8, 3, 8, 8) * 2 - 1, size=(size, size), mode="bilinear")
    with torch.no_grad():
        mean, log_variance = encoder.law(images)
    assert 0.002 < mean.std() < 1
    assert log_variance.abs().max() < 4


@pytest.mark.parametrize("image_size", [32, 64])
def test_dcgans_widths_are_those_of_the_generator(image_size: int) -> None:
    def widths(network: nn.Module) -> list[int]:
        return [module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d)]

    generator = build_generator("dcgan", image_size=image_size, nz=5)
    assert widths(build_encoder("dcgan", image_size=image_size, nz=5)) == widths(generator)[::-1]


def test_bounded_codes_are_tanh_of_the_outputs() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("dcgan", image_size=32, nz=5, bounded=True).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), torch.tanh(encoder.network(images)))


def test_an_autoencoder_is_both_in_a_row() -> None:
    encoder, decoder = Encoder(nn.Flatten(), 4), nn.Unflatten(1, (1, 2, 2))
    images = torch.rand(3, 1, 2, 2)
    assert torch.equal(Autoencoder(encoder, decoder)(images), images)


def test_a_critic_of_codes() -> None:
    critic = CodeCritic(3, width=7, depth=2)
    assert critic(torch.rand(4, 3)).shape == (4, 1)
    assert [tuple(weight.shape) for weight in critic.parameters()] == [(7, 3), (7,), (7, 7), (7,), (1, 7), (1,)]


@pytest.mark.parametrize(("name", "size"), [("pixels", 32), ("dcgan", 48), ("resnet", 40), ("vgg19", 30)])
def test_bad_input_is_about_the_encoder(name: str, size: int) -> None:
    with pytest.raises(InputError) as refused:
        build_encoder(name, image_size=size, nz=4)
    assert refused.value.argument == "encoder"
