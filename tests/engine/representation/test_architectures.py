import pytest
import torch
from torch import nn

from engine.representation.architectures import ARCHITECTURES, find_architecture
from engine.support.errors import InputError


def layers(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(("name", "size"), [("vgg-small", 8), ("vgg19", 32), ("resnet18", 8), ("dcgan-encoder", 32)])
def test_outputs_and_a_gradient_for_every_parameter(name, size):
    network = ARCHITECTURES[name].make(7, size)
    outputs = network(torch.randn(4, 3, size, size))
    assert outputs.shape == (4, 7)
    outputs.backward(torch.randn_like(outputs))
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_vgg19_is_16_convolutions_of_3x3_with_batchnorm():
    network = ARCHITECTURES["vgg19"].make(10, 32)
    convolutions = layers(network, nn.Conv2d)
    assert [conv.out_channels for conv in convolutions] == [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    assert {conv.kernel_size for conv in convolutions} == {(3, 3)}
    assert len(layers(network, nn.BatchNorm2d)) == 16
    assert len(layers(network, nn.MaxPool2d)) == 5


def test_resnet18_keeps_the_side_of_small_images():
    network = ARCHITECTURES["resnet18"].make(10, 32)
    sides = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, args, output: sides.append(tuple(output.shape[1:3])))
    network(torch.randn(2, 3, 32, 32))
    assert sides == [(64, 32)] * 2 + [(128, 16)] * 2 + [(256, 8)] * 2 + [(512, 4)] * 2
    assert not layers(network, nn.MaxPool2d)


@pytest.mark.parametrize(("size", "widths"), [(32, [64, 128, 256]), (64, [64, 128, 256, 512])], ids=str)
def test_dcgan_encoder_halves_down_to_4x4_and_a_code(size, widths):
    network = ARCHITECTURES["dcgan-encoder"].make(128, size)
    convolutions = layers(network, nn.Conv2d)
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions] == [
        (64, 4, 2),
        (64, 3, 1),
        (64, 3, 1),
        *[(width, 4, 2) for width in widths[1:]],
        (128, 4, 1),
    ]
    assert network.features(torch.randn(2, 3, size, size)).shape == (2, widths[-1], 4, 4)


@pytest.mark.parametrize(
    ("name", "size", "named"),
    [
        ("vgg16", 32, [*ARCHITECTURES, "vgg16"]),
        ("vgg19", 48, ["vgg19", "32", "48"]),
        ("resnet18", 0, ["resnet18", "8", "0"]),
        ("dcgan-encoder", 48, ["dcgan-encoder", "32, 64, 128", "48"]),
    ],
)
def test_bad_input_is_one_line_about_the_name(name, size, named):
    """It names what was asked for, and what would do."""
    with pytest.raises(InputError) as error:
        find_architecture(name, size)
    assert error.value.argument == "name"
    assert all(part in error.value.message for part in named)
    assert "\n" not in str(error.value)
