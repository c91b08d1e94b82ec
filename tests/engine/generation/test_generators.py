import itertools

import pytest
import torch
from torch import nn

from engine.generation.networks import build_generator
from engine.support.errors import InputError


def dcgan_parameters(widths, nz):
    count = nz * 16 * widths[0] + 2 * widths[0]
    count += sum(16 * width * following + 2 * following for width, following in itertools.pairwise(widths))
    return count + 2 * (9 * 64 * 64 + 2 * 64) + 16 * 64 * 3 + 3


def resnet_parameters(widths, nz):
    count = (nz + 1) * 16 * widths[0]
    for width, following in itertools.pairwise(widths):
        count += (width + 1) * following + 2 * width + 9 * width * following + 2 * following
        count += (9 * following + 1) * following
    return count + 2 * widths[-1] + 9 * widths[-1] * 3 + 3


COUNTS = [
    ("dcgan", 32, dcgan_parameters([256, 128, 64], 100)),
    ("dcgan", 64, dcgan_parameters([512, 256, 128, 64], 100)),
    ("dcgan", 128, dcgan_parameters([512, 512, 256, 128, 64], 100)),
    ("resnet", 32, resnet_parameters([512, 256, 128, 64], 100)),
    ("resnet", 64, resnet_parameters([512, 512, 256, 128, 64], 100)),
    ("resnet", 128, resnet_parameters([512, 512, 512, 256, 128, 64], 100)),
]


@pytest.mark.parametrize(("name", "size", "count"), COUNTS, ids=[f"{name}-{size}" for name, size, _ in COUNTS])
def test_parameters_shapes_range_and_layout(name, size, count):
    generator = build_generator(name, image_size=size)
    assert sum(parameter.numel() for parameter in generator.parameters()) == count
    images = generator(torch.randn(2, 100))
    assert images.shape == (2, 3, size, size)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.abs().max() <= 1
    assert images.std() > 0
    images.backward(torch.randn_like(images))
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in generator.parameters())


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_interpolation_takes_the_place_of_each_transposed_convolution(upsampling, size):
    transposed = build_generator("dcgan", image_size=size)
    generator = build_generator("dcgan", image_size=size, upsampling=upsampling)
    assert generator(torch.randn(2, 100)).shape == (2, 3, size, size)
    kernels = [(module, module.weight) for module in transposed.modules() if isinstance(module, nn.ConvTranspose2d)]
    # 4×4 weights for each pair of channels become 3×3.
    fewer = sum(weight.numel() * 7 // 16 for _, weight in kernels)
    counts = [sum(parameter.numel() for parameter in net.parameters()) for net in (transposed, generator)]
    assert counts[0] - counts[1] == fewer > 0
    assert not any(isinstance(module, nn.ConvTranspose2d) for module in generator.modules())


@pytest.mark.parametrize(("upsampling", "is_flat"), [("transposed", False), ("nearest", True), ("bilinear", True)])
def test_only_transposed_convolutions_draw_a_checkerboard_on_a_flat_map(upsampling, is_flat):
    """Away from the border, a flat map stays flat through interpolation and a convolution, whatever the weights."""
    layer = build_generator("dcgan", image_size=32, upsampling=upsampling).last.double()
    inside = layer(torch.ones(1, 64, 8, 8, dtype=torch.float64))[..., 4:-4, 4:-4]
    assert (inside.std(dim=(2, 3)).max() < 1e-12) == is_flat


def test_first_layer_is_the_transposed_convolution_of_a_1x1_image():
    first = build_generator("dcgan", image_size=32, nz=7).first
    z = torch.randn(3, 7)
    kernel = first.linear.weight.view(4, 4, 256, 7).permute(3, 2, 0, 1)
    torch.testing.assert_close(first(z), torch.nn.functional.conv_transpose2d(z[:, :, None, None], kernel))


def test_shortcut_equals_convolution_of_the_upsampled_image():
    block = build_generator("resnet", image_size=32).blocks[0].double()
    x = torch.randn(2, 512, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(block.upsample(block.shortcut(x)), block.shortcut(block.upsample(x)))


def test_initialisation():
    dcgan = build_generator("dcgan", image_size=32)
    for weight, mean in ((dcgan.first.linear.weight, 0), (dcgan.last.weight, 0), (dcgan.layers[0].weight, 1)):
        assert abs(weight.mean().item() - mean) < 5e-3
        assert 0.017 < weight.std().item() < 0.023
    conv = build_generator("resnet", image_size=32).blocks[0].conv1.weight
    bound = (6 / (9 * 512 + 9 * 256)) ** 0.5
    assert 0.99 * bound < conv.abs().max().item() <= bound


@pytest.mark.parametrize("name", ["dcgan", "resnet"])
def test_same_seed_same_images(name):
    images = []
    for _ in range(2):
        torch.manual_seed(3)
        images.append(build_generator(name, image_size=32, nz=16)(torch.randn(4, 16)))
    assert torch.equal(*images)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"name": "biggan", "image_size": 32}, "generator"),
        ({"name": "dcgan", "image_size": 16}, "generator"),
        ({"name": "dcgan", "image_size": 48}, "generator"),
        ({"name": "resnet", "image_size": 256}, "generator"),
        ({"name": "dcgan", "image_size": 32, "nz": 0}, "nz"),
        ({"name": "dcgan", "image_size": 32, "upsampling": "bicubic"}, "upsampling"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(arguments, name):
    with pytest.raises(InputError) as error:
        build_generator(**arguments)
    assert error.value.argument == name
    assert "\n" not in str(error.value)


def test_z_of_another_length_is_refused():
    with pytest.raises(ValueError, match="z: expected"):
        build_generator("dcgan", image_size=32, nz=8)(torch.randn(2, 9))
