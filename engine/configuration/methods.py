"""The settings that say who learns what from whom, in groups that belong to a method or to several.

Every field is a flag of the same name, and begins with its method's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.comparison.averagers import AVERAGERS
from engine.comparison.distances.kernels import KERNELS
from engine.comparison.pooling import POOLS
from engine.configuration.options import MOST_IMAGES, Settings, option, require

METHODS = ("gfmn", "mmd")
# Of the kernels that have bandwidths, in units of the median distance between real images (imq: of its square).
# Wide rational quadratics alone leave strokes blurred on the digits; these read best of those that were tried.
MMD_BANDWIDTHS = {
    "gaussian": (0.25, 0.5, 1.0, 2.0, 4.0),
    "rational-quadratic": (0.05, 0.1, 0.2),
    "imq": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
}


@dataclass(kw_only=True)
class MethodConfig(Settings):
    """Who learns what from whom."""

    method: str = option(
        "gfmn",
        "'gfmn' matches the mean and the variance of every feature; 'mmd' the kernel MMD of pooled features",
        choices=METHODS,
        since="0.2",
    )


@dataclass(kw_only=True)
class GfmnConfig(Settings):
    """How moments are matched."""

    methods: ClassVar[tuple[str, ...]] = ("gfmn",)

    averager: str = option("ama", "what smooths the differences of moments", choices=tuple(AVERAGERS))
    ama_lr: float = option(1e-5, "AMA's learning rate α", above=0, at_most=1e30, metavar="X")
    ama_variant: str = option("paper", "AMA as in the paper, or as in the authors' code", choices=("paper", "authors"))
    ma_alpha: float | None = option(
        None, "moving average's α (0.1 for the paper's, 1 for the authors')", above=0, at_most=1, metavar="X"
    )
    ma_variant: str = option("paper", "moving average of differences, or of moments", choices=("paper", "authors"))
    feature_scale: str = option(
        "none",
        "weigh features by their deviation in the target ('none' is the paper)",
        choices=("none", "target-deviation"),
    )
    correction: int = option(1, "c of the variances' N − c", at_least=0, at_most=1, metavar="C")

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
        "σ of the Gaussian kernels that are added, α of rational quadratics, or scales of IMQ, in units of the median "
        "distance between real images (default: "
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
    mmd_images: int = option(
        10_000,
        "real images that every minibatch is compared with, at most",
        at_least=2,
        at_most=MOST_IMAGES,
        metavar="N",
        since="0.2",
    )
    pool: str = option(
        "grid4",
        "what is compared of every map: its mean, its means over a 4×4 grid, or every feature",
        choices=tuple(POOLS),
        since="0.2",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        takes = self.mmd_kernel in MMD_BANDWIDTHS
        require(takes or not self.mmd_bandwidths, "mmd_bandwidths", f"--mmd-kernel {self.mmd_kernel} has none")
        polynomial = self.mmd_kernel == "polynomial"
        require(polynomial or self.mmd_degree == 3, "mmd_degree", f"--mmd-kernel {self.mmd_kernel} has none")

    @property
    def bandwidths(self) -> tuple[float, ...]:
        """The given ones, or else the kernel's."""
        return self.mmd_bandwidths or MMD_BANDWIDTHS.get(self.mmd_kernel, ())

    @property
    def summary(self) -> str:
        return f"MMD with {self.mmd_kernel} kernels, pooled by {self.pool}"
