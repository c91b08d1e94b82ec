"""Our own networks whose frozen features are matched, as plain modules that can be trained.

Each maps images `[N, 3, H, W]` to K outputs `[N, K]`: class scores, or an autoencoder's latent code before its tanh.
`build_extractor` taps their activations and drops the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from engine.support.errors import InputError

_VGG19 = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512, "M")
_VGG_SMALL = (32, 32, "M", 64, 64, "M", 128, 128, "M")


class VGG(nn.Module):
    """VGG (Simonyan and Zisserman 2015) with BatchNorm: 3×3 convolutions, BatchNorm, ReLU, 2×2 max pooling ("M")."""

    def __init__(self, plan: tuple[int | str, ...], num_classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for entry in plan:
            if entry == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                width = int(entry)
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to outputs [N, K]."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """ResNet's two-convolution block (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, width, H/stride, W/stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet18(nn.Module):
    """ResNet18 for small images: a 3×3 stride-1 stem without max pooling, so that 32×32 images keep their positions."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        blocks = []
        channels = 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [BasicBlock(channels, width, stride), BasicBlock(width, width, 1)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to outputs [N, K]."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.classifier(x.mean(dim=(2, 3)))


class DCGANEncoder(nn.Module):
    """The encoder of the paper's DCGAN-like autoencoder (section 5.1 and supplement): convolution, BatchNorm, ReLU.

    4×4 stride 2 to 64 channels, two extra 3×3 of 64, 4×4 stride 2 to 128, 256 (and 512 from 64 pixels on) down to 4×4,
    and a 4×4 valid convolution to the latent code. At 32×32 that is 3·16,384 + 8,192 + 4,096 = 61,440 features.
    """

    def __init__(self, num_outputs: int, image_size: int):
        super().__init__()
        halvings = (image_size // 4).bit_length() - 1
        widths = [min(64 << stage, 512) for stage in range(halvings)]
        layers = [*self._layer(3, 64, 4, 2), *self._layer(64, 64, 3, 1), *self._layer(64, 64, 3, 1)]
        for channels, width in itertools.pairwise(widths):
            layers += self._layer(channels, width, 4, 2)
        self.features = nn.Sequential(*layers)
        self.latent = nn.Conv2d(widths[-1], num_outputs, 4)

    @staticmethod
    def _layer(channels: int, width: int, side: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels, width, side, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(width), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to outputs [N, K]."""
        return self.latent(self.features(x)).flatten(1)


@dataclass(frozen=True)
class Architecture:
    """How a named network is made.

    Attributes:
        make: from a number of outputs and the images' side to the module.
        multiple_of: image sides must be a multiple of this.
        sizes: the only image sides that it takes; None for any.
    """

    make: Callable[[int, int], nn.Module]
    multiple_of: int = 1
    sizes: tuple[int, ...] | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "vgg-small": Architecture(lambda outputs, _: VGG(_VGG_SMALL, outputs), multiple_of=8),
    "vgg19": Architecture(lambda outputs, _: VGG(_VGG19, outputs), multiple_of=32),
    "resnet18": Architecture(lambda outputs, _: ResNet18(outputs), multiple_of=8),
    "dcgan-encoder": Architecture(DCGANEncoder, sizes=(32, 64, 128)),
}


def find_architecture(name: str, image_size: int) -> Architecture:
    """The architecture `name`; raise InputError if it is unknown or cannot take images of this size."""
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise InputError("name", f"{name!r} is not known; choose one of {', '.join(ARCHITECTURES)}")
    if architecture.sizes is not None and image_size not in architecture.sizes:
        sizes = ", ".join(map(str, architecture.sizes))
        raise InputError("name", f"{name} takes images of {sizes} pixels, not {image_size}")
    multiple = architecture.multiple_of
    if image_size < multiple or image_size % multiple:
        do = fitting_size(image_size, lambda size: size % multiple == 0)
        raise InputError(
            "name", f"{name} needs images whose side is a multiple of {multiple}, got {image_size}; {do} would do"
        )
    return architecture


def fitting_size(image_size: int, fits: Callable[[int], bool]) -> int | None:
    """Of the sides of images that are usual, the next larger one that `fits`, or else the next smaller one."""
    usual = (8, 16, 32, 64, 128, 224, 256, 299, 384, 512, 1024)
    larger, smaller = [size for size in usual if size > image_size], [size for size in usual if size < image_size]
    return next((size for size in [*larger, *reversed(smaller)] if fits(size)), None)
