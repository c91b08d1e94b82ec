"""An extractor that cannot take the images' size is refused in one line, with a size that it takes."""

from __future__ import annotations

import re

import pytest
from torch import nn

from engine.representation.build import build_extractor
from engine.support.errors import InputError


class Fixed(nn.Module):
    """Takes images of 48 pixels and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 2, 3, stride=8), nn.ReLU(), nn.Linear(72, 1)

    def forward(self, x):
        return self.head(self.relu(self.conv(x)).flatten(1))


@pytest.mark.parametrize(
    ("name", "size", "takes"),
    [
        ("torchvision:alexnet", 32, 64),
        ("torchvision:squeezenet1_1", 8, 32),
        ("vgg19", 48, 64),
        ("vgg-small", 36, 64),
        ("vgg-small", 4, 8),
        ("dcgan-encoder", 16, 32),
    ],
)
def test_a_size_that_would_do(name: str, size: int, takes: int, capfd) -> None:
    with pytest.raises(InputError) as error:
        build_extractor(name, image_size=size)
    assert error.value.argument == "name"
    assert "\n" not in str(error.value)
    assert str(takes) in re.findall(r"\d+", error.value.message.partition("; ")[2] or error.value.message)
    assert capfd.readouterr() == ("", "")
    assert build_extractor(name, image_size=takes).image_size == takes


def test_no_usual_size_would_do(capfd) -> None:
    with pytest.raises(InputError) as error:
        build_extractor("mine", image_size=32, module=Fixed())
    assert error.value.argument == "module"
    assert "it takes" not in error.value.message
    assert capfd.readouterr() == ("", "")
    assert build_extractor("mine", image_size=48, module=Fixed()).taps


def test_a_network_without_feature_maps_says_so_at_any_size() -> None:
    with pytest.raises(InputError, match="no feature maps"):
        build_extractor("torchvision:vit_b_32", image_size=32)
