"""The settings that say who learns what from whom, in groups that belong to a method or to several.

Every field is a flag of the same name, and begins with its method's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.comparison.averagers import AMA_VARIANTS, AVERAGERS
from engine.comparison.distances.kernels import KERNELS
from engine.comparison.pooling import make_pool
from engine.configuration.options import MOST_IMAGES, Settings, option, require

METHODS: dict[str, str] = {
    "gfmn": "the mean and the variance of every feature",
    "mmd": "the kernel MMD of pooled features",
    "frechet": "their Fréchet distance, with full covariances",
    "sinkhorn": "their Sinkhorn divergence",
    "drifting": "their drifting field",
    "gmmn": "√MMD² of pixels, or of what --extractor gives",
    "gan": "what a critic tells real from generated images by, in one of several games",
    "mmd-gan": "the kernel MMD of a critic's outputs",
    "began": "how well a critic draws real and generated images again",
    "fisher-gan": "a critic's means, in units of its deviation",
    "mcgan": "means or covariances of a critic's outputs",
    "improved-gan": "the mean of a critic's hidden features",
    "dfm": "a critic's outputs and hidden features, these with what a denoiser makes of them",
    "molm": "means of a network's activations and weight gradients, which is trained now and then",
    "ae": "real images and what an autoencoder makes of them",
    "vae": "the same, with Gaussians of codes near the prior",
    "wae": "the same, with all codes together near the prior",
    "gmmn-ae": "√MMD² of an autoencoder's codes",
    "glo": "each real image and what the generator makes of its code, which is learnt",
    "imle": "each real image and the nearest of many samples",
    "glann": "glo's codes and the nearest of mapped noise",
}
"""What each method compares."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method needs besides a generator.

    Attributes:
        features: a frozen extractor, and what it finds in the real images (the target).
        captured: whether a step may be captured in a CUDA graph. Not one that waits for the device, as "frechet" has:
            a library of the host's drives its SVD.
    """

    features: bool = True
    captured: bool = True


NEEDS: dict[str, Needs] = {
    "gfmn": Needs(),
    "mmd": Needs(),
    "frechet": Needs(captured=False),
    "sinkhorn": Needs(),
    "drifting": Needs(),
    "gmmn": Needs(),
    "gan": Needs(features=False),
    "mmd-gan": Needs(features=False),
    "began": Needs(features=False),
    "fisher-gan": Needs(features=False),
    "mcgan": Needs(features=False),
    "improved-gan": Needs(features=False),
    "dfm": Needs(features=False),
    "molm": Needs(features=False, captured=False),
    "ae": Needs(features=False),
    "vae": Needs(features=False),
    "wae": Needs(features=False),
    "gmmn-ae": Needs(features=False, captured=False),
    "glo": Needs(features=False, captured=False),
    "imle": Needs(features=False, captured=False),
    "glann": Needs(features=False, captured=False),
}
PLAYING = ("gan", "mmd-gan", "began", "fisher-gan", "mcgan", "improved-gan", "dfm")
"""The methods in whose every step a generator and a critic learn from each other."""
ADVERSARIAL = (*PLAYING, "molm")
"""The methods that train a critic."""
AUTOENCODING = ("ae", "vae", "wae", "gmmn-ae")
"""The methods in which an encoder and a decoder, the generator, reproduce real images."""
LATENT = ("glo", "imle", "glann")
"""The methods that draw real images again without an encoder: by codes that are learnt, or samples that are found."""
WITH_TABLE = ("glo", "glann")
"""Those of them that have a code for each real image."""
COMPARING = tuple(name for name, needs in NEEDS.items() if needs.features)
"""The methods that compare features."""
_ON_FEATURES = tuple(name for name in COMPARING if name != "gfmn")
# Of the kernels that have bandwidths, in units of the median distance between real images (imq: of its square).
# Wide rational quadratics alone leave strokes blurred on the digits; these read best of those that were tried.
MMD_BANDWIDTHS = {
    "gaussian": (0.25, 0.5, 1.0, 2.0, 4.0),
    "rational-quadratic": (0.05, 0.1, 0.2),
    "rational-quadratic-linear": (0.05, 0.1, 0.2),
    "imq": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
}


def named(methods: Sequence[str]) -> str:
    """These methods, for people."""
    return "the methods that compare features" if methods == COMPARING else f"--method {' or '.join(methods)}"


def _real_images(default: int) -> Any:
    return option(
        default,
        "real images that every minibatch is compared with, at most",
        at_least=2,
        at_most=MOST_IMAGES,
        metavar="N",
        since="0.2",
    )


@dataclass(kw_only=True)
class MethodConfig(Settings):
    """Who learns what from whom."""

    method: str = option(
        "gfmn",
        "what is matched: " + "; ".join(f"'{name}' {what}" for name, what in METHODS.items()),
        choices=tuple(METHODS),
        since="0.2",
    )


@dataclass(kw_only=True)
class GfmnConfig(Settings):
    """How moments are matched."""

    methods: ClassVar[tuple[str, ...]] = ("gfmn",)

    averager: str = option("ama", "what smooths the differences of moments", choices=tuple(AVERAGERS))
    ama_lr: float = option(1e-5, "AMA's learning rate α", above=0, at_most=1e30, metavar="X")
    ama_variant: str = option(
        "paper",
        "AMA as in the paper, or as in the authors' code, with today's Adam or with PyTorch 0.3's, on which it ran",
        choices=AMA_VARIANTS,
    )
    ma_alpha: float | None = option(
        None, "moving average's α (0.1 for the paper's, 1 for the authors')", above=0, at_most=1, metavar="X"
    )
    ma_variant: str = option("paper", "moving average of differences, or of moments", choices=("paper", "authors"))
    feature_scale: str = option(
        "none",
        "weigh features by their deviation in the target ('none' is the paper)",
        choices=("none", "target-deviation"),
    )
    correction: int = option(
        1, "c of the variances' N − c; with --population of the target's alone", at_least=0, at_most=1, metavar="C"
    )

    @property
    def summary(self) -> str:
        names = {"ama": "AMA", "ma": "moving average", "none": "no averager"}
        return names.get(self.averager, self.averager)


@dataclass(kw_only=True)
class MmdConfig(Settings):
    """The kernel MMD of pooled features to a fixed set of real images."""

    methods: ClassVar[tuple[str, ...]] = ("mmd",)

    mmd_kernel: str = option("rational-quadratic", "kernel that compares images", choices=tuple(KERNELS), since="0.2")
    mmd_bandwidths: tuple[float, ...] = option(
        (),
        "σ of the Gaussian kernels that are added, in units of the median distance between real images; c of IMQ, in "
        "units of its square; or α of rational quadratics (default: "
        + "; ".join(f"{name} {' '.join(map(str, values))}" for name, values in MMD_BANDWIDTHS.items())
        + ")",
        above=0,
        at_least=1e-6,  # the squares of much smaller ones are 0
        at_most=1e6,
        metavar="X",
        since="0.2",
    )
    mmd_degree: int = option(3, "degree of the polynomial kernel", at_least=1, at_most=100, metavar="N", since="0.2")
    mmd_unbiased: bool = option(False, "the unbiased estimate of MMD², not the biased one", since="0.2")
    mmd_landmarks: int | None = option(
        None,
        "compare with the real images' mean embedding on this many landmarks (k-means), which costs as much as so many "
        "images and counts all of --mmd-images",
        at_least=1,
        at_most=MOST_IMAGES,
        metavar="M",
        since="0.2",
    )
    mmd_images: int = _real_images(10_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        takes = self.mmd_kernel in MMD_BANDWIDTHS
        require(takes or not self.mmd_bandwidths, "mmd_bandwidths", f"--mmd-kernel {self.mmd_kernel} has none")
        landmarks, images = self.mmd_landmarks, self.mmd_images
        fewer = landmarks is None or landmarks <= images
        require(fewer, "mmd_landmarks", f"must be at most --mmd-images, {images}; got {landmarks}")
        polynomial = self.mmd_kernel == "polynomial"
        require(polynomial or self.mmd_degree == 3, "mmd_degree", f"--mmd-kernel {self.mmd_kernel} has none")

    @property
    def bandwidths(self) -> tuple[float, ...]:
        """The given ones, or else the kernel's."""
        return self.mmd_bandwidths or MMD_BANDWIDTHS.get(self.mmd_kernel, ())

    @property
    def summary(self) -> str:
        return f"MMD with {self.mmd_kernel} kernels"


@dataclass(kw_only=True)
class FrechetConfig(Settings):
    """The Fréchet distance of pooled features to all real images: that of FID, of any network and minibatch."""

    methods: ClassVar[tuple[str, ...]] = ("frechet",)

    @property
    def summary(self) -> str:
        return "Fréchet distance"


@dataclass(kw_only=True)
class SinkhornConfig(Settings):
    """The Sinkhorn divergence of pooled features to a fixed set of real images: entropic transport, debiased."""

    methods: ClassVar[tuple[str, ...]] = ("sinkhorn",)

    sinkhorn_epsilon: float = option(
        0.05,
        "ε, in units of the mean squared distance between real images",
        above=0,
        at_most=1e6,
        metavar="X",
        since="0.2",
    )
    sinkhorn_iterations: int = option(
        50, "Sinkhorn's iterations in a step; a smaller ε needs more", at_least=1, metavar="N", since="0.2"
    )
    sinkhorn_images: int = _real_images(2_000)

    @property
    def summary(self) -> str:
        return f"Sinkhorn divergence with ε {self.sinkhorn_epsilon:g}"


@dataclass(kw_only=True)
class DriftingConfig(Settings):
    """The drifting field of pooled features: attracted by real images, repelled by generated ones."""

    methods: ClassVar[tuple[str, ...]] = ("drifting",)

    drifting_temperatures: tuple[float, ...] = option(
        (0.02, 0.05, 0.2), "τ, in units of the mean distance", above=0, at_most=1e6, metavar="X", since="0.2"
    )
    drifting_images: int = _real_images(2_000)

    @property
    def summary(self) -> str:
        return f"drifting with τ {' '.join(f'{tau:g}' for tau in self.drifting_temperatures)}"


@dataclass(kw_only=True)
class GmmnConfig(Settings):
    """Generative moment matching networks (Li et al. 2015): √MMD² with Gaussian kernels, on pixels by default."""

    methods: ClassVar[tuple[str, ...]] = ("gmmn",)

    gmmn_bandwidths: tuple[float, ...] = option(
        (2.0, 5.0, 10.0, 20.0, 40.0, 80.0),
        "σ of exp(−d²/(2σ)), as GMMN's code has them for 784 pixels in [0, 1]; of F features they count F/784 times",
        above=0,
        at_least=1e-6,
        at_most=1e9,
        metavar="X",
        since="0.2",
    )
    gmmn_images: int = _real_images(2_000)

    @property
    def summary(self) -> str:
        return "√MMD² with Gaussian kernels"


@dataclass(kw_only=True)
class FeaturesConfig(Settings):
    """What of the features is compared."""

    methods: ClassVar[tuple[str, ...]] = _ON_FEATURES

    pool: str = option(
        "grid4",
        "what is compared of every map: 'mean', 'mean+std' (with its deviation), its means over a K×K 'gridK', or "
        "'none', every feature; of tokens (timm:vit_NAME) the default is 'mean'",
        metavar="NAME",
        since="0.2",
    )
    normalise_losses: bool = option(
        False,
        "of several networks, divide each one's loss by its own size (and add 0.01 to that), so that all count alike",
        since="0.2",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        make_pool(self.pool)

    @property
    def summary(self) -> str:
        return f"pooled by {self.pool}"


@dataclass(kw_only=True)
class PopulationConfig(Settings):
    """Past minibatches that count besides the newest one."""

    methods: ClassVar[tuple[str, ...]] = ("gfmn", "frechet")

    population: str = option(
        "none",
        "compare running statistics of generated images, with the gradient through the newest minibatch: 'ema', a "
        "moving average, or a 'queue' of the last images; takes the averager's place",
        choices=("none", "ema", "queue"),
        since="0.2",
    )
    population_decay: float = option(0.9, "β of --population ema", at_least=0, below=1, metavar="X", since="0.2")
    population_images: int = option(
        640,
        "images of --population queue, with the newest minibatch; for gfmn a multiple of --batch-size",
        at_least=2,
        at_most=MOST_IMAGES,
        metavar="N",
        since="0.2",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        decays, queues = self.population == "ema", self.population == "queue"
        require(decays or self.population_decay == 0.9, "population_decay", "needs --population ema")
        require(queues or self.population_images == 640, "population_images", "needs --population queue")

    @property
    def summary(self) -> str:
        return {
            "none": "",
            "ema": f"population by moving average, β {self.population_decay:g}",
            "queue": f"population of {self.population_images} images",
        }[self.population]
