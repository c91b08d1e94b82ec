"""Penalties of the critic's outputs themselves: alike for an image and its copy, small, or enough to draw it again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.comparison.games.outputs import check_positive, wide
from engine.comparison.games.penalties.protocols import Added, Play
from engine.support.errors import InputError

_LARGEST_SHIFT = 1 / 8  # of an image's height and width; 4 pixels of 32, as in the papers


@dataclass(frozen=True)
class Consistency(Added):
    """λ ‖D(x) − D(Tx)‖² at real images (CR-GAN, Zhang et al. 2020), T as in `flipped_and_shifted`.

    With `balanced`, λ ‖D(G) − D(TG)‖² is added (bCR-GAN, Zhao et al. 2020, with its two weights equal). Gradients go
    through both outputs. Draws: three numbers for each image, or six. Cost: a forward of the copies.

    Raises:
        InputError: "weight", if it isn't positive and finite.
    """

    weight: float = 10.0
    balanced: bool = False

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def terms(self, play: Play) -> Tensor:
        """See `Penalty.terms`; one for every real image, or for every pair of a real and a generated one."""
        found = _moved(play, play.real, play.phi_real)
        if self.balanced:
            found = found + _moved(play, play.fake, play.phi_fake)
        return self.weight * found


@dataclass(frozen=True)
class Activations(Added):
    """λ times the mean over outputs of φ(x)², at real images (L2 of Bińkowski et al. 2018, with λ = 1).

    The authors' code takes the critic's other layers and generated images as well.

    Raises:
        InputError: "weight", if it isn't positive and finite.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def terms(self, play: Play) -> Tensor:
        """See `Penalty.terms`; one for every real image."""
        return self.weight * wide(play.phi_real[play.own]).square().mean(dim=1)


@dataclass(frozen=True)
class Autoencoding(Added):
    """λ (‖x − dec φ(x)‖² + ‖G − dec φ(G)‖²), means over pixels (MMD-GAN, Li et al. 2017, as in their code).

    It keeps φ injective. The critic has `decode`: outputs [n, F] → images [n, 3, H, W].

    Raises:
        InputError: "weight", if it isn't positive and finite; "critic", by `terms`, if it has no `decode`.
    """

    weight: float = 8.0

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def terms(self, play: Play) -> Tensor:
        """See `Penalty.terms`; one for every pair of a real and a generated image."""
        decode = getattr(play.critic, "decode", None)
        if decode is None:
            raise InputError("critic", "has no decoder to draw images from its outputs: choose an autoencoder's critic")
        errors = [
            (wide(decode(phi[play.own])) - images).flatten(1).square().mean(dim=1)
            for images, phi in ((play.real, play.phi_real), (play.fake, play.phi_fake))
        ]
        return self.weight * (errors[0] + errors[1])


def flipped_and_shifted(images: Tensor, uniform: Tensor) -> Tensor:
    """Each image [n, C, H, W] mirrored or not, and shifted by whole pixels; the border is filled by reflection.

    By the image's numbers u [n, 3] in [0, 1): mirrored left to right if u_0 < ½; shifted down by ⌊u_1 (2s+1)⌋ − s
    rows and right by ⌊u_2 (2s+1)⌋ − s columns, s = ⌊H/8⌋ and ⌊W/8⌋. So all shifts from −s to s are equally likely.
    Differentiable in the images.
    """
    _, channels, height, width = images.shape
    rows = _shifted(height, uniform[:, 1])
    columns = _shifted(width, uniform[:, 2])
    columns = torch.where((uniform[:, 0] < 0.5)[:, None], width - 1 - columns, columns)
    # Not by indices, whose shape PyTorch says may depend on them.
    found = images.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width))
    return found.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


def _shifted(size: int, uniform: Tensor) -> Tensor:
    """Where each of `size` places of the shifted images comes from, [n, size]."""
    most = int(size * _LARGEST_SHIFT)
    # What should be below 1 may have been rounded to it.
    shift = (uniform * (2 * most + 1)).floor().clamp(max=2 * most).long() - most
    source = (torch.arange(size, device=uniform.device) - shift[:, None]).abs()
    return size - 1 - (size - 1 - source).abs()


def _moved(play: Play, images: Tensor, outputs: Tensor) -> Tensor:
    """‖D(x) − D(Tx)‖² [n]."""
    copies = flipped_and_shifted(images, play.uniform(3).to(images.device))
    return (wide(outputs[play.own]) - wide(play.critic(copies))).square().sum(dim=1)
