"""Encoders e(x): images [N, 3, H, W] to codes [N, nz], or to Gaussians of codes: critics' networks, in another role."""

from __future__ import annotations

from torch import Tensor, nn

from engine.representation.critics import build_critic
from engine.representation.critics.architectural import ARCHITECTURE_CRITICS
from engine.support.errors import InputError

ENCODERS = ("dcgan", "resnet", *ARCHITECTURE_CRITICS)


class Encoder(nn.Module):
    """A network whose outputs for an image are its code, or the mean and the log variance of a Gaussian of codes.

    Args:
        network: images [N, 3, H, W] → [N, nz], or [N, 2·nz] if gaussian: means first.
        nz: length of a code.
        gaussian: see above.
        bounded: whether codes are in (−1, 1), tanh of the outputs.

    Raises:
        InputError: "bounded", if gaussian as well.
    """

    def __init__(self, network: nn.Module, nz: int, *, gaussian: bool = False, bounded: bool = False):
        super().__init__()
        if gaussian and bounded:
            raise InputError("bounded", "a Gaussian of codes has no bounds")
        self.network, self.nz, self.gaussian, self.bounded = network, nz, gaussian, bounded

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

    It has the layers and widths of the generator of the same name in the other direction, and BatchNorm as that has;
    or the architecture of an extractor.

    Args:
        name: one of `ENCODERS`.
        image_size: 32, 64 or 128, or what the extractor's network takes.
        nz, gaussian, bounded: see `Encoder`.

    Raises InputError for an unknown name, or a size that the network cannot have.
    """
    if name not in ENCODERS:
        raise InputError("encoder", f"{name!r} is not known; choose one of {', '.join(ENCODERS)}")
    try:
        network = build_critic(name, image_size=image_size, outputs=2 * nz if gaussian else nz, norm="batch")
    except InputError as error:
        raise InputError("encoder", error.message) from None
    return Encoder(network, nz, gaussian=gaussian, bounded=bounded)


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
