"""Critics D(x; ψ): networks that are trained against a generator, from images [N, 3, H, W] to outputs [N, F]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from engine.representation.critics.architectural import ARCHITECTURE_CRITICS, ArchitectureCritic
from engine.representation.critics.autoencoders import AutoencoderCritic, EncoderDecoderCritic
from engine.representation.critics.convolutional import CRITIC_SIZES, DCGANCritic, ResNetCritic
from engine.representation.critics.critic import Critic, CriticSpec
from engine.representation.critics.spectral import normalise_spectrally
from engine.support.errors import InputError

__all__ = ["CRITICS", "CRITIC_NORMS", "CRITIC_SIZES", "Critic", "CriticSpec", "build_critic"]

_AUTOENCODER = "autoencoder"
_OWN: dict[str, Callable[[CriticSpec], Critic]] = {
    "dcgan": DCGANCritic,
    "resnet": ResNetCritic,
    _AUTOENCODER: AutoencoderCritic,
    "encoder-decoder": EncoderDecoderCritic,
}
CRITICS = (*_OWN, *ARCHITECTURE_CRITICS)
CRITIC_NORMS = ("none", "batch", "spectral", "spectral-scaled")


def build_critic(
    name: str,
    *,
    image_size: int,
    outputs: int = 1,
    norm: str = "none",
    minibatch_discrimination: bool = False,
    weights: str | Path | None = None,
) -> Critic:
    """A critic of image_size × image_size images, in channels_last, initialised from torch's default random state.

    Args:
        name: "dcgan", "resnet", "autoencoder" (BEGAN's), "encoder-decoder" (of Li's MMD-GAN), or an extractor's
            network: "vgg-small", "vgg19", "resnet18".
        image_size: 32, 64 or 128, or what the extractor's network takes.
        outputs: F, how many numbers it says of an image; an autoencoder says one.
        norm: "none"; "batch", where the source of the network has it; "spectral", of every convolution and linear
            layer, or "spectral-scaled", with a learned scale for each (`SpectralNorm`). An autoencoder has none.
        minibatch_discrimination: add `MinibatchDiscrimination` to the features that the last layer sees.
        weights: that an extractor's network starts from, see `ArchitectureCritic`.

    Raises InputError for an unknown name or norm, for a size or options that the network cannot have, and for weights
    that do not fit.
    """
    spec = CriticSpec(name, image_size, outputs, norm, minibatch_discrimination)
    _check(spec, weights)
    if name in ARCHITECTURE_CRITICS:
        try:
            critic: Critic = ArchitectureCritic(spec, weights)
        except InputError as error:
            argument = {"name": "critic", "weights": "critic_weights"}.get(str(error.argument), error.argument)
            raise InputError(argument, error.message) from None
    else:
        critic = _OWN[name](spec)
    critic = critic.to(memory_format=torch.channels_last)
    if norm.startswith("spectral"):
        normalise_spectrally(list(critic.modules()), scaled=norm == "spectral-scaled")
    return critic


def _check(spec: CriticSpec, weights: str | Path | None) -> None:
    """Raise InputError for the first argument that cannot be."""
    name = spec.name
    if name not in CRITICS:
        raise InputError("critic", f"{name!r} is not known; choose one of {', '.join(CRITICS)}")
    if spec.norm not in CRITIC_NORMS:
        raise InputError("critic_norm", f"{spec.norm!r} is not one of {', '.join(CRITIC_NORMS)}")
    if spec.outputs < 1:
        raise InputError("critic_outputs", f"must be at least 1, got {spec.outputs}")
    if name in _OWN and spec.image_size not in CRITIC_SIZES:
        sizes = ", ".join(map(str, CRITIC_SIZES))
        raise InputError("critic", f"{name} takes images of {sizes} pixels, not {spec.image_size}")
    if name in _OWN and weights is not None:
        raise InputError("critic_weights", f"{name} has none to start from; leave them out, or use an extractor's")
    if name == _AUTOENCODER:
        if spec.outputs != 1:
            raise InputError("critic_outputs", f"must be 1 for {name}: how badly it reproduces an image")
        if spec.norm != "none":
            raise InputError("critic_norm", f"must be none for {name}, not {spec.norm}")
        if spec.minibatch_discrimination:
            raise InputError("minibatch_discrimination", f"leave it out for {name}: no layer of it would see it")
