"""The settings of autoencoding methods: the encoder, what is reproduced, and where codes are to lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.configuration.methods import AUTOENCODING, LATENT
from engine.configuration.options import Settings, option, require
from engine.representation.encoders import ENCODERS

if TYPE_CHECKING:
    from engine.configuration.config import Config

CODE_BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
RECONSTRUCTIONS = ("pixels", "pyramid", "perceptual")


@dataclass(kw_only=True)
class AutoencoderConfig(Settings):
    """The encoder of real images, whose codes the generator turns into images again."""

    methods: ClassVar[tuple[str, ...]] = (*AUTOENCODING, *LATENT)

    encoder: str | None = option(
        None,
        f"network of the encoder: {', '.join(ENCODERS)} (default: that of --generator)",
        metavar="NAME",
        methods=AUTOENCODING,
        since="0.2",
    )
    reconstruction: str = option(
        "pixels",
        "how reproduced and real images are compared: squared errors summed over 'pixels'; Laplacian 'pyramid's; or "
        "'perceptual', by the features of --perceptual",
        choices=RECONSTRUCTIONS,
        since="0.2",
    )
    perceptual: str = option(
        "efficientnet-lite0",
        "network of --reconstruction perceptual and of --search features; names are those of --extractor, also several "
        "joined by +, of which only one may need a file of weights",
        metavar="NAME",
        since="0.2",
    )
    perceptual_weights: str | None = option(
        None,
        "weights of --perceptual: a file, 'imagenet' or 'random' (default: its own)",
        metavar="FILE",
        resumable=True,
        since="0.2",
    )
    perceptual_chunk: int | None = option(
        None,
        "images that --perceptual sees at once, all by default; less memory, the same result",
        at_least=1,
        metavar="N",
        resumable=True,
        since="0.2",
    )
    code_weight: float = option(
        1.0,
        "weight of the codes' distance from the prior, beside the mean error of an image",
        above=0,
        at_most=1e30,
        metavar="X",
        methods=("vae", "wae"),
        since="0.2",
    )
    divergence: str = option(
        "mmd",
        "what tells codes from draws of --prior: the kernel 'mmd', or a critic ('gan', adversarial autoencoders)",
        choices=("mmd", "gan"),
        methods=("wae",),
        since="0.2",
    )
    code_critic_lr: float | None = option(
        None,
        "learning rate of the critic of codes (default: half of --lr)",
        above=0,
        at_most=1e30,
        metavar="X",
        methods=("wae",),
        since="0.2",
    )
    autoencoder_steps: int = option(
        1000,
        "steps of the autoencoder; in those that are left of --steps a network learns to draw its codes",
        at_least=1,
        metavar="N",
        methods=("gmmn-ae",),
        since="0.2",
    )
    code_noise: int = option(
        16,
        "dimensions of the noise that a network maps to codes, of which --prior is the law",
        at_least=1,
        at_most=2**16,
        metavar="K",
        methods=("gmmn-ae", "glann"),
        since="0.2",
    )
    code_width: int = option(
        256,
        "width of the two hidden layers of the network that maps noise to codes",
        at_least=1,
        at_most=2**16,
        metavar="N",
        methods=("gmmn-ae", "glann"),
        since="0.2",
    )
    code_bandwidths: tuple[float, ...] = option(
        CODE_BANDWIDTHS,
        "σ of the Gaussian kernels that compare codes, in units of the root of their mean squared distance",
        above=0,
        at_least=1e-6,
        at_most=1e6,
        metavar="X",
        methods=("gmmn-ae",),
        since="0.2",
    )
    mapping_lr: float | None = option(
        None,
        "learning rate of the network that maps noise to codes (default: --lr)",
        above=0,
        at_most=1e30,
        metavar="X",
        methods=("gmmn-ae", "glann"),
        since="0.2",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.encoder is None or self.encoder in ENCODERS
        require(known, "encoder", f"{self.encoder!r} is not known; choose one of {', '.join(ENCODERS)}")
        require(len(self.code_bandwidths) > 0, "code_bandwidths", "is an empty list")

    @property
    def summary(self) -> str:
        found = {"pyramid": "Laplacian pyramids", "perceptual": f"features of {self.perceptual}"}
        return f"images compared by {found.get(self.reconstruction, self.reconstruction)}"


def needs_perceptual(config: Config) -> bool:
    """Whether the features of a frozen network compare images, or find the nearest."""
    method = config.method.method
    searched = method == "imle" and config.latent.search == "features"
    return searched or (method in (*AUTOENCODING, *LATENT) and config.autoencoder.reconstruction == "perceptual")


def idle_codes(config: Config) -> dict[str, str]:
    """Fields of autoencoding methods that decide nothing in `config`, each with the reason."""
    own, method = config.autoencoder, config.method.method
    found: dict[str, str] = {}
    if method not in (*AUTOENCODING, *LATENT):
        return found
    if not needs_perceptual(config):
        for name in ("perceptual", "perceptual_weights", "perceptual_chunk"):
            either = " or --search features" if method == "imle" else ""
            found[name] = f"needs --reconstruction perceptual{either}, and this is {own.reconstruction}"
    if method == "wae" and own.divergence != "gan":
        found["code_critic_lr"] = f"needs --divergence gan, and this is {own.divergence}"
    if method == "ae":
        found["prior"] = "--method ae draws images from a Gaussian that it fits to its codes"
    return found


def check_autoencoding(config: Config) -> None:
    """InputError if settings of the autoencoder make no sense together."""
    own, method, prior = config.autoencoder, config.method.method, config.networks.prior
    if method == "vae":
        require(prior == "gaussian", "prior", f"--method vae draws codes to a gaussian, not {prior}")
    if method == "gmmn-ae":
        steps, first = config.training.steps, own.autoencoder_steps
        left = f"{first} leave none of {steps} --steps for the network that draws codes"
        require(first < steps, "autoencoder_steps", left)
