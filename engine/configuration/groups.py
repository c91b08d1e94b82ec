"""The settings of a training run, in groups.

Every field is a flag of the same name (`batch_size` is `--batch-size`). A group with `methods` belongs to these alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from engine.comparison.averagers import AVERAGERS
from engine.comparison.distances.kernels import KERNELS
from engine.comparison.pooling import POOLS
from engine.generation.priors import PRIORS
from engine.support.errors import InputError
from pipelines import DATASETS

METHODS = ("gfmn", "mmd")
# Of the kernels that have bandwidths, in units of the median distance between real images (imq: of its square).
# Wide rational quadratics alone leave strokes blurred on the digits; these read best of those that were tried.
MMD_BANDWIDTHS = {
    "gaussian": (0.25, 0.5, 1.0, 2.0, 4.0),
    "rational-quadratic": (0.05, 0.1, 0.2),
    "imq": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    resumable: bool = False,
) -> Any:
    """A field with what its flag needs: the help text, the choices if there are only some, how to read its text.

    A `resumable` one may change when a run is resumed: it says where and how a run computes, or where files lie whose
    content is checked, never what.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "parse": parse, "resumable": resumable}
    return field(default=default, metadata=metadata)


def require(condition: bool, name: str, message: str) -> None:
    """InputError on the field `name` unless `condition`."""
    if not condition:
        raise InputError(name, message)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b", re.IGNORECASE)


def memory_bytes(text: str, name: str = "memory_budget") -> int:
    """Bytes of a size such as "12GiB" (12 · 2^30) or "800MB" (800 · 10^6); InputError if it is none."""
    match = _SIZE.fullmatch(text.strip())
    require(
        match is not None and float(match[1]) > 0,
        name,
        f"{text!r} is not a size; give a number and its unit, as in 12GiB or 800MB",
    )
    assert match is not None
    power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _chunk_size(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images nor 'auto'") from None


@dataclass(kw_only=True)
class DataConfig:
    """The real images."""

    dataset: str = option("digits", "kind of data set", choices=tuple(DATASETS))
    data: str | None = option(
        None, "folder of images (or an archive of arrays), where the data set needs one", metavar="PATH", resumable=True
    )
    image_size: int = option(32, "side of the images in pixels", metavar="PIXELS")
    center_crop: int | None = option(None, "cut this square out of the middle before resizing", metavar="PIXELS")
    horizontal_flip: bool = option(False, "count mirrored images as well")
    skip_bad_images: bool = option(False, "leave out unreadable images instead of stopping")
    loader: str = option("auto", "who decodes and delivers images", choices=("auto", "dali", "torch"), resumable=True)

    def __post_init__(self) -> None:
        require(self.image_size >= 8, "image_size", f"must be at least 8, got {self.image_size}")
        require(self.center_crop is None or self.center_crop > 0, "center_crop", "must be positive")


@dataclass(kw_only=True)
class NetworksConfig:
    """The extractor, frozen, and the generator, trained."""

    extractor: str = option("vgg-small", "network whose features are matched; several joined by +", metavar="NAME")
    weights: tuple[str, ...] = option(
        ("pretrain",),
        "the extractor's weights: files, one for each network; 'imagenet'; 'random'; or 'pretrain' to train it on the "
        "data set first (torchvision:, timm: and efficientnet-lite0 keep their ImageNet weights)",
        metavar="FILE",
        resumable=True,
    )
    extractor_bn: str = option("running", "statistics of the extractor's BatchNorm", choices=("running", "batch"))
    layers: int | None = option(None, "match at most this many layers of each network", metavar="K")
    layers_from: str = option("bottom", "count --layers from the images or from the top", choices=("bottom", "top"))
    taps: str | None = option(None, "match only layers of these names (a glob, or several: a,b)", metavar="PATTERN")
    generator: str = option("dcgan", "network that is trained", choices=("dcgan", "resnet"))
    nz: int = option(100, "dimensions of the generator's input z", metavar="N")
    prior: str = option("gaussian", "law of z", choices=tuple(PRIORS))
    sample_bn: str = option(
        "running",
        "statistics of the generator's BatchNorm when sampling ('batch': the authors' code)",
        choices=("running", "batch"),
    )

    def __post_init__(self) -> None:
        require(self.nz >= 1, "nz", f"must be at least 1, got {self.nz}")
        require(self.layers is None or self.layers >= 1, "layers", f"must be at least 1, got {self.layers}")


@dataclass(kw_only=True)
class MethodConfig:
    """Who learns what from whom."""

    method: str = option(
        "gfmn",
        "'gfmn' matches the mean and the variance of every feature; 'mmd' the kernel MMD of pooled features",
        choices=METHODS,
    )


@dataclass(kw_only=True)
class GfmnConfig:
    """How moments are matched."""

    methods: ClassVar[tuple[str, ...]] = ("gfmn",)

    averager: str = option("ama", "what smooths the differences of moments", choices=tuple(AVERAGERS))
    ama_lr: float = option(1e-5, "AMA's learning rate α", metavar="X")
    ama_variant: str = option("paper", "AMA as in the paper, or as in the authors' code", choices=("paper", "authors"))
    ma_alpha: float | None = option(None, "moving average's α (0.1 for the paper's, 1 for the authors')", metavar="X")
    ma_variant: str = option("paper", "moving average of differences, or of moments", choices=("paper", "authors"))
    feature_scale: str = option(
        "none",
        "weigh features by their deviation in the target ('none' is the paper)",
        choices=("none", "target-deviation"),
    )
    correction: int = option(1, "c of the variances' N − c, 0 or 1", metavar="C")

    def __post_init__(self) -> None:
        require(self.ama_lr > 0, "ama_lr", f"must be positive, got {self.ama_lr}")
        require(self.ma_alpha is None or 0 < self.ma_alpha <= 1, "ma_alpha", f"must be in (0, 1], got {self.ma_alpha}")
        require(self.correction in (0, 1), "correction", f"must be 0 or 1, got {self.correction}")

    @property
    def summary(self) -> str:
        names = {"ama": "AMA", "ma": "moving average", "none": "no averager"}
        return names.get(self.averager, self.averager)


@dataclass(kw_only=True)
class MmdConfig:
    """The kernel MMD of pooled features to a fixed set of real images."""

    methods: ClassVar[tuple[str, ...]] = ("mmd",)

    mmd_kernel: str = option("rational-quadratic", "kernel that compares images", choices=tuple(KERNELS))
    mmd_bandwidths: tuple[float, ...] = option(
        (),
        "σ of the Gaussian kernels that are added, α of rational quadratics, or scales of IMQ, in units of the median "
        "distance between real images (default: "
        + "; ".join(f"{name} {' '.join(map(str, values))}" for name, values in MMD_BANDWIDTHS.items())
        + ")",
        metavar="X",
    )
    mmd_degree: int = option(3, "degree of the polynomial kernel", metavar="N")
    mmd_unbiased: bool = option(False, "the unbiased estimate of MMD², not the biased one")
    mmd_images: int = option(10_000, "real images that every minibatch is compared with, at most", metavar="N")
    pool: str = option(
        "grid4",
        "what is compared of every map: its mean, its means over a 4×4 grid, or every feature",
        choices=tuple(POOLS),
    )

    def __post_init__(self) -> None:
        for value in self.mmd_bandwidths:
            require(0 < value < math.inf, "mmd_bandwidths", f"must be positive, got {value}")
        takes = self.mmd_kernel in MMD_BANDWIDTHS
        require(takes or not self.mmd_bandwidths, "mmd_bandwidths", f"--mmd-kernel {self.mmd_kernel} has none")
        polynomial = self.mmd_kernel == "polynomial"
        require(polynomial or self.mmd_degree == 3, "mmd_degree", f"--mmd-kernel {self.mmd_kernel} has none")
        require(self.mmd_degree >= 1, "mmd_degree", f"must be at least 1, got {self.mmd_degree}")
        require(self.mmd_images >= 2, "mmd_images", f"must be at least 2, got {self.mmd_images}")

    @property
    def bandwidths(self) -> tuple[float, ...]:
        """The given ones, or else the kernel's."""
        return self.mmd_bandwidths or MMD_BANDWIDTHS.get(self.mmd_kernel, ())

    @property
    def summary(self) -> str:
        return f"MMD with {self.mmd_kernel} kernels, pooled by {self.pool}"


@dataclass(kw_only=True)
class MatchingConfig:
    """How features are computed: the same for every method that compares them, and the same result."""

    target: str | None = option(
        None,
        "what engine.precompute knows of the real images; computed and cached by default",
        metavar="FILE",
        resumable=True,
    )
    chunk_size: int | str | None = option(
        None,
        "images that the extractor sees at once, all by default; 'auto' is as many as fit into --memory-budget",
        metavar="N|auto",
        parse=_chunk_size,
        resumable=True,
    )
    memory_budget: str | None = option(
        None,
        "memory of the device that a step may need, weights included, such as 12GiB or 800MB; for --chunk-size auto "
        "(default: most of what is free), --plan, and as a limit for fixed chunks",
        metavar="SIZE",
        resumable=True,
    )
    recompute: str = option(
        "none",
        "'stages': keep the extractor's activations at a few places only and compute the others again in backward, "
        "stage by stage; less memory and more time, the same result",
        choices=("none", "stages"),
        resumable=True,
    )
    kernels: str = option(
        "auto", "backend of the fused kernels", choices=("auto", "reference", "compiled", "triton"), resumable=True
    )
    fused_ama: bool = option(
        True, "fused kernels (--kernels auto); off means plain PyTorch (--kernels reference)", resumable=True
    )

    def __post_init__(self) -> None:
        chunk = self.chunk_size
        known = chunk == "auto" or not isinstance(chunk, str)
        require(known, "chunk_size", f"{chunk!r} is neither a number nor 'auto'")
        require(not isinstance(chunk, int) or chunk >= 1, "chunk_size", f"must be at least 1, got {chunk}")
        if self.memory_budget is not None:
            memory_bytes(self.memory_budget)
        contradiction = not self.fused_ama and self.kernels in ("compiled", "triton")
        require(not contradiction, "no_fused_ama", f"contradicts --kernels {self.kernels}")

    @property
    def images_per_chunk(self) -> int | None:
        """The number for `MomentMatching(chunk_size=)`; ValueError while it is "auto" (see `training.planner`)."""
        if isinstance(self.chunk_size, str):
            raise ValueError("chunk_size: 'auto' has to be replaced by a number first")
        return self.chunk_size

    @property
    def backend(self) -> str:
        """The name for `MomentMatching(kernels=)`."""
        return self.kernels if self.fused_ama else "reference"


@dataclass(kw_only=True)
class TrainingConfig:
    """The generator's training."""

    batch_size: int = option(64, "images in a minibatch", metavar="N")
    steps: int = option(1500, "training steps", metavar="N", resumable=True)
    lr: float = option(5e-5, "learning rate of the generator's Adam", metavar="X")
    beta1: float = option(0.5, "β1 of the generator's Adam", metavar="X")
    beta2: float = option(0.999, "β2 of the generator's Adam", metavar="X")
    generator_ema: float | None = option(None, "sample from this moving average of the weights", metavar="DECAY")
    recompute_generator: bool = option(
        False,
        "compute the generator's activations again in backward instead of keeping them; the same result",
        resumable=True,
    )
    amp: bool = option(False, "mixed precision")
    amp_dtype: str = option("bf16", "the low precision of --amp", choices=("bf16", "fp16"))
    seed: int = option(0, "of everything random", metavar="N")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"), resumable=True)
    threads: int | None = option(None, "CPU threads, all cores by default", metavar="N", resumable=True)

    def __post_init__(self) -> None:
        require(
            self.batch_size >= 2, "batch_size", f"a minibatch of {self.batch_size} has no variance; give at least 2"
        )
        require(self.steps >= 1, "steps", f"must be at least 1, got {self.steps}")
        require(self.lr > 0, "lr", f"must be positive, got {self.lr}")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, f"must be in [0, 1), got {getattr(self, name)}")
        decay = self.generator_ema
        require(decay is None or 0 < decay < 1, "generator_ema", f"must be between 0 and 1, got {decay}")
        require(0 <= self.seed < 2**63, "seed", f"must be from 0 to 2^63 − 1, got {self.seed}")
        require(self.threads is None or self.threads >= 1, "threads", f"must be at least 1, got {self.threads}")


@dataclass(kw_only=True)
class OutputConfig:
    """What is written, and how often."""

    log_every: int = option(10, "steps between lines of metrics.jsonl", metavar="N", resumable=True)
    sample_every: int = option(250, "steps between sample grids", metavar="N", resumable=True)
    checkpoint_every: int = option(500, "steps between checkpoints", metavar="N", resumable=True)
    keep_checkpoints: int = option(2, "checkpoints to keep", metavar="N", resumable=True)
    profile: int | None = option(
        None, "trace this many steps with torch.profiler, into profile.json", metavar="N", resumable=True
    )

    def __post_init__(self) -> None:
        for name in ("log_every", "sample_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            require(value >= 1, name, f"must be at least 1, got {value}")
        require(self.profile is None or self.profile >= 1, "profile", f"must be at least 1, got {self.profile}")


@dataclass(kw_only=True)
class ValidationConfig:
    """Comparing samples with the real images during training; see `engine.evaluate`."""

    evaluate_every: int | None = option(None, "steps between evaluations, none by default", metavar="N")
    evaluate_samples: int = option(5000, "samples of each evaluation", metavar="N")
    evaluate_extractor: str | None = option(
        None, "network whose features are compared (default: Inception-v3, as for FID and KID)", metavar="NAME"
    )
    evaluate_weights: str | None = option(
        None, "weights of that network: a file (default: its own)", metavar="FILE", resumable=True
    )
    lr_adapt: str = option(
        "none",
        "'kid': lower --lr when samples stop getting closer to the real images, by the three-sample KID test",
        choices=("none", "kid"),
    )

    def __post_init__(self) -> None:
        every = self.evaluate_every
        require(every is None or every >= 1, "evaluate_every", f"must be at least 1, got {every}")
        samples = self.evaluate_samples
        require(samples >= 2, "evaluate_samples", f"must be at least 2, got {samples}")
        adapts = self.lr_adapt != "none"
        require(not adapts or every is not None, "lr_adapt", "needs --evaluate-every N")


GROUPS: dict[str, type] = {
    "method": MethodConfig,
    "data": DataConfig,
    "networks": NetworksConfig,
    "gfmn": GfmnConfig,
    "mmd": MmdConfig,
    "matching": MatchingConfig,
    "training": TrainingConfig,
    "output": OutputConfig,
    "validation": ValidationConfig,
}
"""Every group of settings; one with `methods` belongs to those alone."""


def owners(name: str) -> tuple[str, ...]:
    """The methods that a field belongs to; () if it belongs to all."""
    group = next(group for group in GROUPS.values() if name in field_names(group))
    return getattr(group, "methods", ())


def field_names(group: type) -> set[str]:
    """Of a group of settings."""
    return {entry.name for entry in dataclasses.fields(group)}


def resumable() -> set[str]:
    """The fields that may change when a run is resumed."""
    entries = (entry for group in GROUPS.values() for entry in dataclasses.fields(group))
    return {entry.name for entry in entries if entry.metadata["resumable"]}
