"""Encoders e(x): images [N, 3, H, W] to codes [N, nz], or to Gaussians of codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.representation.architectures import ARCHITECTURES, find_architecture
from engine.representation.critics import build_critic
from engine.representation.critics.convolutional import ResNetCritic
from engine.support.errors import InputError

_RESNET, _DCGAN = "resnet", "dcgan-encoder"
ENCODERS = ("dcgan", _RESNET, *(name for name in ARCHITECTURES if name != _DCGAN))


class Encoder(nn.Module):
    """A network whose outputs for an image are its code, or the mean and the log variance of a Gaussian of codes.

    Args:
        network: images [N, 3, H, W] → [N, nz], or [N, 2·nz] if gaussian: means first.
        nz: length of a code.
        gaussian: see above.
        bounded: whether codes are in (−1, 1), tanh of the outputs.
        name: of the network in `ENCODERS`; "" for any other.

    Raises:
        InputError: "bounded", if gaussian as well.
    """

    def __init__(self, network: nn.Module, nz: int, *, gaussian: bool = False, bounded: bool = False, name: str = ""):
        super().__init__()
        if gaussian and bounded:
            raise InputError("bounded", "a Gaussian of codes has no bounds")
        self.network, self.nz, self.gaussian, self.bounded, self.name = network, nz, gaussian, bounded, name

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to codes [N, nz]; of Gaussians their means."""
        codes = self.network(images)
        if self.gaussian:
            return codes[:, : self.nz]
        return codes.tanh() if self.bounded else codes

    def law(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The means and the log variances [N, nz] of a gaussian encoder."""
        mean, log_variance = self.network(images).chunk(2, dim=1)
        return mean, log_variance


class Autoencoder(nn.Module):
    """From images to codes and back.

    Args:
        encoder: images [N, 3, H, W] → codes [N, nz].
        decoder: codes → images.
    """

    def __init__(self, encoder: Encoder, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions [N, 3, H, W] of `images`."""
        return self.decoder(self.encoder(images))


def build_encoder(name: str, *, image_size: int, nz: int, gaussian: bool = False, bounded: bool = False) -> Encoder:
    """An encoder of image_size × image_size images, in channels_last, initialised from torch's default random state.

    "dcgan" and "resnet" have the layers and widths of the generators of these names in the other direction, and
    BatchNorm as those have: the encoder that extractors are pretrained with, and `ResNetEncoder`. The others are
    extractors' architectures.

    Args:
        name: one of `ENCODERS`.
        image_size: 32, 64 or 128, or what the extractor's network takes.
        nz, gaussian, bounded: see `Encoder`.

    Raises InputError for an unknown name, or a size that the network cannot have.
    """
    if name not in ENCODERS:
        raise InputError("encoder", f"{name!r} is not known; choose one of {', '.join(ENCODERS)}")
    outputs = 2 * nz if gaussian else nz
    try:
        if name == _RESNET:
            network: nn.Module = ResNetEncoder(image_size, outputs)
        else:
            network = find_architecture(_DCGAN if name == "dcgan" else name, image_size).make(outputs, image_size)
    except InputError as error:
        raise InputError("encoder", error.message) from None
    network = network.to(memory_format=torch.channels_last)
    return Encoder(network, nz, gaussian=gaussian, bounded=bounded, name=name)


class ResNetEncoder(nn.Module):
    """The residual blocks of SN-GAN's critic with BatchNorm; then BatchNorm, ReLU, the mean over positions, and a
    linear layer. (The critic sums over positions, and its outputs start in the tens: codes that tanh makes ±1, and log
    variances whose exponential overflows.) Its initialisation: Xavier, with gain √2 for 3×3 convolutions.

    Args:
        image_size: 32, 64 or 128.
        outputs: for each image.
    """

    def __init__(self, image_size: int, outputs: int):
        super().__init__()
        critic = build_critic(_RESNET, image_size=image_size, outputs=outputs, norm="batch")
        assert isinstance(critic, ResNetCritic)
        self.blocks, self.last = critic.blocks, critic.last
        self.bn = nn.BatchNorm2d(critic.last.in_features)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to [N, outputs]."""
        return self.last(torch.relu(self.bn(self.blocks(images))).mean(dim=(2, 3)))


class CodeCritic(nn.Sequential):
    """Tells codes of real images from draws of the prior (WAE-GAN): codes [N, nz] → [N, 1].

    Linear layers with ReLU between them, `depth` hidden ones of `width`. WAE's has four of 512 (Tolstikhin et al. 2018,
    appendix C).
    """

    def __init__(self, nz: int, width: int = 512, depth: int = 4):
        layers: list[nn.Module] = []
        for number in range(depth):
            layers += [nn.Linear(nz if number == 0 else width, width), nn.ReLU()]
        super().__init__(*layers, nn.Linear(width, 1))
