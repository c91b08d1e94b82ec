"""The settings of methods that match what a critic sees: a denoiser of its features, and learned moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.configuration.options import MOST_IMAGES, Settings, option, require

if TYPE_CHECKING:
    from engine.configuration.config import Config


@dataclass(kw_only=True)
class DenoisingConfig(Settings):
    """Denoising feature matching: the denoiser of the critic's features, and what the generator makes of it."""

    methods: ClassVar[tuple[str, ...]] = ("dfm",)

    denoise_weight: float = option(
        0.03,
        "weight, in the generator's loss, of the mean squared change that the denoiser makes to features",
        at_least=0,
        at_most=1e30,
        metavar="X",
        since="0.2",
    )
    adversarial_weight: float = option(
        1.0,
        "weight, in the generator's loss, of the non-saturating game",
        at_least=0,
        at_most=1e30,
        metavar="X",
        since="0.2",
    )
    denoise_deviation: float = option(
        1.0,
        "deviation of the noise that the denoiser learns to take away, in units of the critic's features",
        above=0,
        at_most=1e30,
        metavar="X",
        since="0.2",
    )
    denoiser_width: int = option(
        1024, "units of the denoiser's hidden layers", at_least=1, at_most=2**16, metavar="N", since="0.2"
    )
    denoiser_layers: int = option(
        10, "linear layers of the denoiser", at_least=1, at_most=1000, metavar="N", since="0.2"
    )
    denoiser_lr: float | None = option(
        None, "learning rate of the denoiser (default: --lr)", above=0, at_most=1e30, metavar="X", since="0.2"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        some = self.denoise_weight > 0 or self.adversarial_weight > 0
        require(some, "adversarial_weight", "is 0 as --denoise-weight is, and the generator has nothing to learn")


@dataclass(kw_only=True)
class MomentsConfig(Settings):
    """Learned moments: when the moment network (the critic) learns, and what of it is matched."""

    methods: ClassVar[tuple[str, ...]] = ("molm",)

    moment_every: int = option(
        100,
        "train the moment network before every so many steps of the generator",
        at_least=1,
        metavar="N",
        since="0.2",
    )
    moment_steps: int = option(
        100,
        "steps of the moment network, each time it is trained",
        at_least=1,
        at_most=1_000_000,
        metavar="K",
        since="0.2",
    )
    moment_images: int = option(
        10_000,
        "real images, in whole minibatches, whose mean moments are matched until the network changes again",
        at_least=1,
        at_most=MOST_IMAGES,
        metavar="N",
        since="0.2",
    )
    moment_penalty: float = option(
        0.01,
        "weight of (‖E ∇D‖² − 1)², which keeps gradients with respect to the network's weights of length 1",
        at_least=0,
        at_most=1e30,
        metavar="X",
        since="0.2",
    )
    moment_scale: float = option(
        0.1,
        "factor of images and hidden units among the moments; that of weight gradients is 1",
        at_least=0,
        at_most=1e30,
        metavar="X",
        since="0.2",
    )


def check_moments(config: Config) -> None:
    """InputError if the moment network is none whose moments are each image's own."""
    own = config.critic.critic_norm != "batch"
    require(own, "critic_norm", "batch mixes images, and the moments of --method molm are means of each one's own")
