"""Critics of convolutions alone: DCGAN's, and the residual one of WGAN-GP and SN-GAN."""

from __future__ import annotations

import itertools
import math

import torch.nn.functional as F
from torch import Tensor, nn

from engine.representation.critics.activation import Rectified
from engine.representation.critics.critic import CriticSpec, LinearCritic
from engine.support.initialise import initialise_normal

CRITIC_SIZES = (32, 64, 128)
_SLOPE = 0.2
_LAST_SIDE = 4


def dcgan_widths(image_size: int) -> list[int]:
    """Channels of the layers that halve the side down to 4×4, those of the DCGAN generator in the other direction."""
    return [min(64 << stage, 512) for stage in range((image_size // _LAST_SIDE).bit_length() - 1)]


class DCGANCritic(LinearCritic):
    """DCGAN's discriminator (Radford et al. 2016), with the widths of our DCGAN generator.

    4×4 convolutions of stride 2 down to 4×4: 64, 128, 256 channels for 32 pixels, 512 and 512 more for 64 and 128;
    LeakyReLU of slope 0.2 after each, and BatchNorm before it in all but the first, if there is any. Features are the
    4×4 maps of the last. Weights start N(0, 0.02), BatchNorm's scales N(1, 0.02).
    """

    def __init__(self, spec: CriticSpec):
        widths = dcgan_widths(spec.image_size)
        super().__init__(spec, widths[-1] * _LAST_SIDE**2)
        layers: list[nn.Module] = []
        for channels, width in itertools.pairwise((3, *widths)):
            normalised = spec.norm == "batch" and channels != 3
            layers.append(nn.Conv2d(channels, width, 4, 2, padding=1, bias=not normalised))
            if normalised:
                layers.append(nn.BatchNorm2d(width))
            layers.append(Rectified(_SLOPE))
        self.layers = nn.Sequential(*layers)
        self.apply(initialise_normal)

    def features(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to [N, 16·C], in the order (C, H, W)."""
        return self.layers(images).flatten(1)


class PooledConv2d(nn.Conv2d):
    """A convolution (3×3 or 1×1, zeros around the images) and 2×2 average pooling after it, as one of stride 2.

    The mean of four neighbours of Σ_k w_k x_{i+k} is one sum over 4×4 (2×2) inputs, whose weights are the means of four
    neighbours of w, zeros around it. The same numbers as of a 3×3 convolution at 16/36 of the work, and no map at the
    full size. Pooling of its own would also send zeros back where a penalty is differentiated twice, see `rectified`.
    """

    def __init__(self, channels: int, width: int, side: int):
        super().__init__(channels, width, side, padding=side // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, width, H/2, W/2]."""
        weight = F.avg_pool2d(self.weight, 2, stride=1, padding=1)
        return F.conv2d(x, weight, self.bias, stride=2, padding=self.padding)


class DownsamplingBlock(nn.Module):
    """Residual block of a critic (Gulrajani et al. 2017; Miyato et al. 2018, appendix B.4): ReLU, 3×3, ReLU, 3×3,
    average pooling, plus a pooled 1×1 shortcut. BatchNorm before each ReLU, if there is any.

    Args:
        channels, width: of the input and of the output; the map between the two convolutions is as wide as the input.
        halves: whether it pools. A block that does not, and has as many channels as before, adds its input as it is.
        first: whether the input is images: no ReLU before the first convolution, which already widens.
        batch_norm: whether there is BatchNorm.
    """

    def __init__(self, channels: int, width: int, *, halves: bool, first: bool, batch_norm: bool):
        super().__init__()
        self.first = first
        inner = width if first else channels
        self.bn1 = nn.BatchNorm2d(channels) if batch_norm and not first else nn.Identity()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(inner) if batch_norm else nn.Identity()
        self.conv2 = PooledConv2d(inner, width, 3) if halves else nn.Conv2d(inner, width, 3, padding=1)
        self.rectified = Rectified(0.0)
        self.shortcut: nn.Module = nn.Identity()
        if halves:
            self.shortcut = PooledConv2d(channels, width, 1)
        elif channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, width, H/2, W/2], or [N, width, H, W] if it doesn't halve."""
        out = self.conv1(x if self.first else self.rectified(self.bn1(x)))
        return self.conv2(self.rectified(self.bn2(out))) + self.shortcut(x)


_RESNET_WIDTHS = {
    32: ((128, True), (128, True), (128, False), (128, False)),
    64: ((64, True), (128, True), (256, True), (512, True), (1024, True)),
    128: ((64, True), (128, True), (256, True), (512, True), (1024, True), (1024, False)),
}
"""Side → channels of each block, and whether it halves. 32: Miyato et al. 2018, table 4 (CIFAR10). 128: table 6, but
that the last of its blocks keeps the side, as in their code; 64: that of Miyato and Koyama 2018, without classes."""


class ResNetCritic(LinearCritic):
    """The residual critic of SN-GAN (Miyato et al. 2018), which WGAN-GP is compared with as well.

    `DownsamplingBlock`s, ReLU, the sum over all positions. Xavier initialisation, with gain √2 for 3×3 convolutions;
    zero biases.
    """

    def __init__(self, spec: CriticSpec):
        plan = _RESNET_WIDTHS[spec.image_size]
        widths = [3, *(width for width, _ in plan)]
        super().__init__(spec, widths[-1])
        self.blocks = nn.Sequential(*(
            DownsamplingBlock(channels, width, halves=halves, first=channels == 3, batch_norm=spec.norm == "batch")
            for channels, (width, halves) in zip(widths, plan, strict=False)
        ))  # fmt: skip
        self.rectified = Rectified(0.0)
        self.apply(_initialise_xavier)

    def features(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to [N, C], summed over positions."""
        return self.rectified(self.blocks(images)).sum(dim=(2, 3))


def _initialise_xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        gain = math.sqrt(2.0) if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) else 1.0
        nn.init.xavier_uniform_(module.weight, gain)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
