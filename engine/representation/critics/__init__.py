"""Critics D(x; ψ): networks that are trained against a generator, from images [N, 3, H, W] to outputs [N, F]."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.representation.critics.convolutional import CONVOLUTIONAL_SIZES, DCGANCritic, ResNetCritic
from engine.representation.critics.critic import Critic, CriticSpec
from engine.representation.critics.spectral import normalise_spectrally
from engine.support.errors import InputError

__all__ = ["CRITICS", "CRITIC_NORMS", "Critic", "CriticSpec", "build_critic"]

CRITICS: dict[str, Callable[[CriticSpec], Critic]] = {
    "dcgan": DCGANCritic,
    "resnet": ResNetCritic,
}
CRITIC_NORMS = ("none", "batch", "spectral", "spectral-scaled")


def build_critic(
    name: str,
    *,
    image_size: int,
    outputs: int = 1,
    norm: str = "none",
    minibatch_discrimination: bool = False,
) -> Critic:
    """A critic of image_size × image_size images, in channels_last, initialised from torch's default random state.

    Args:
        name: "dcgan" or "resnet".
        image_size: 32, 64 or 128.
        outputs: F, how many numbers it says of an image.
        norm: "none"; "batch", after convolutions as the source of the network has it; "spectral", of every convolution
            and linear layer, or "spectral-scaled", with a learned scale for each (`SpectralNorm`).
        minibatch_discrimination: add `MinibatchDiscrimination` to the features that the last layer sees.

    Raises InputError for an unknown name or norm, and for a size or a number of outputs that the network cannot have.
    """
    if name not in CRITICS:
        raise InputError("critic", f"{name!r} is not known; choose one of {', '.join(CRITICS)}")
    if norm not in CRITIC_NORMS:
        raise InputError("critic_norm", f"{norm!r} is not one of {', '.join(CRITIC_NORMS)}")
    if outputs < 1:
        raise InputError("critic_outputs", f"must be at least 1, got {outputs}")
    if image_size not in CONVOLUTIONAL_SIZES:
        sizes = ", ".join(map(str, CONVOLUTIONAL_SIZES))
        raise InputError("critic", f"{name} takes images of {sizes} pixels, not {image_size}")
    critic = CRITICS[name](CriticSpec(name, image_size, outputs, norm, minibatch_discrimination))
    critic = critic.to(memory_format=torch.channels_last)
    if norm.startswith("spectral"):
        normalise_spectrally(list(critic.modules()), scaled=norm == "spectral-scaled")
    return critic
