"""The classifiers whose frozen features are matched, as plain modules that can be trained.

Each maps images `[N, 3, H, W]` to class scores `[N, K]`; `build_extractor` taps their activations and drops the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

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
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.classifier(x.mean(dim=(2, 3)))


@dataclass(frozen=True)
class Architecture:
    """How a named network is made.

    Attributes:
        make: from a number of classes to the module.
        head: prefix of the parameters that only classify; weights may have another number of classes or none.
        multiple_of: image sides must be a multiple of this.
        mean, std: normalisation `(x − mean)/std` of images in [0, 1] that its weights were trained with; None for
            networks that take images in [-1, 1] as they are.
    """

    make: Callable[[int], nn.Module]
    head: str = "classifier."
    multiple_of: int = 1
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "vgg-small": Architecture(lambda classes: VGG(_VGG_SMALL, classes), multiple_of=8),
    "vgg19": Architecture(lambda classes: VGG(_VGG19, classes), multiple_of=32),
    "resnet18": Architecture(lambda classes: ResNet18(classes), multiple_of=8),
}
