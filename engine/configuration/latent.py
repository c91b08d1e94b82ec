"""The settings of methods with codes and no encoder: a table of codes, pools of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.configuration.methods import LATENT, WITH_TABLE
from engine.configuration.options import MOST_IMAGES, Settings, option, require
from engine.methods.code_starts import most_dimensions

if TYPE_CHECKING:
    from engine.configuration.config import Config

CODE_STARTS = ("random", "pca")
SEARCHES = ("pixels", "pyramid", "features")


@dataclass(kw_only=True)
class LatentConfig(Settings):
    """A code for each real image, learnt with the generator, and samples of which each real one pulls the nearest."""

    methods: ClassVar[tuple[str, ...]] = LATENT

    code_lr: float = option(
        1e-2,
        "learning rate of codes",
        above=0,
        at_most=1e30,
        metavar="X",
        methods=WITH_TABLE,
        since="0.2",
    )
    code_radius: float = option(
        1.0,
        "radius of the ball that codes stay in",
        above=0,
        at_most=1e6,
        metavar="R",
        methods=WITH_TABLE,
        since="0.2",
    )
    code_start: str = option(
        "random",
        "codes at first: 'random' in the ball, or 'pca', the images' whitened principal components",
        choices=CODE_STARTS,
        methods=WITH_TABLE,
        since="0.2",
    )
    pool_size: int = option(
        640,
        "samples, of which each real one pulls the nearest; of --method glann mapped noise",
        at_least=1,
        at_most=MOST_IMAGES,
        metavar="N",
        methods=("imle", "glann"),
        since="0.2",
    )
    pool_every: int = option(
        10,
        "steps after which the samples of --pool-size are drawn anew",
        at_least=1,
        metavar="K",
        methods=("imle", "glann"),
        since="0.2",
    )
    search: str = option(
        "pyramid",
        "what decides which sample is nearest: distances of 'pixels', of Laplacian 'pyramid's, or of the 'features' of "
        "--perceptual",
        choices=SEARCHES,
        methods=("imle",),
        since="0.2",
    )
    glo_steps: int = option(
        1000,
        "steps that learn codes; in those that are left of --steps a network learns to draw them",
        at_least=1,
        metavar="N",
        methods=("glann",),
        since="0.2",
    )


def check_latent(config: Config) -> None:
    """InputError if settings of codes and pools make no sense together."""
    own, method, batch = config.latent, config.method.method, config.training.batch_size
    if method != "glo":
        fewer = f"is smaller than the minibatch: {own.pool_size} < {batch}; give at least so many"
        require(own.pool_size >= batch, "pool_size", fewer)
    if method in WITH_TABLE and own.code_start == "pca":
        most = most_dimensions(config.data.image_size)
        require(config.networks.nz <= most, "nz", f"--code-start pca has at most {most} dimensions")
    if method == "glann":
        steps, first = config.training.steps, own.glo_steps
        left = f"{first} leave none of {steps} --steps for the network that draws codes"
        require(first < steps, "glo_steps", left)


def idle_latent(config: Config) -> dict[str, str]:
    """Fields of these methods that decide nothing in `config`, each with the reason."""
    if config.method.method != "glo":
        return {}
    return {"prior": "--method glo draws images from a Gaussian that it fits to its codes"}
