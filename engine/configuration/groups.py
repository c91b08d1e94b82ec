"""The settings of a training run, in groups.

Every field is a flag of the same name (`batch_size` is `--batch-size`). A group, or a field, with `methods` belongs to
these alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from engine.configuration.adversarial import CriticConfig, GameConfig
from engine.configuration.autoencoding import AutoencoderConfig
from engine.configuration.latent import LatentConfig
from engine.configuration.methods import (
    COMPARING,
    DriftingConfig,
    FeaturesConfig,
    FrechetConfig,
    GfmnConfig,
    GmmnConfig,
    MethodConfig,
    MmdConfig,
    PopulationConfig,
    SinkhornConfig,
)
from engine.configuration.moment_nets import DenoisingConfig, MomentsConfig
from engine.configuration.options import MOST_IMAGES, Settings, option, require
from engine.configuration.updates import UpdatesConfig, one_or_several, read_decays
from engine.generation.networks import UPSAMPLINGS
from engine.generation.priors import MAX_NZ, PRIORS
from engine.support.errors import InputError
from pipelines import DATASETS

INCEPTION, OWN_WEIGHTS = "inception", "own"
"""Among networks that evaluate, the name of Inception-v3; among their weights, the word for those that one brings."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b", re.IGNORECASE)


def memory_bytes(text: str, name: str = "memory_budget") -> int:
    """Bytes of a size such as "12GiB" (12 · 2^30) or "800MB" (800 · 10^6); InputError if it is none."""
    match = _SIZE.fullmatch(text.strip())
    power = "kmgt".index(match[2].lower()) + 1 if match is not None and match[2] else 0
    size = float(match[1]) * (1024 if match[3] else 1000) ** power if match is not None else 0.0
    require(
        1 <= size < math.inf,
        name,
        f"{text!r} is not a size; give a number and its unit, as in 12GiB or 800MB",
    )
    return int(size)


def _chunk_size(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images nor 'auto'") from None


@dataclass(kw_only=True)
class DataConfig(Settings):
    """The real images."""

    dataset: str = option("digits", "kind of data set", choices=tuple(DATASETS))
    data: str | None = option(
        None,
        "the real images: a folder, .zip, .parquet, .npy, .npz or one picture; or where the data set's files are",
        metavar="PATH",
        resumable=True,
    )
    image_size: int = option(
        32,
        "side of the images in pixels; generators draw 32, 64 or 128",
        at_least=8,
        at_most=4096,
        metavar="PIXELS",
    )
    center_crop: int | None = option(
        None, "cut this square out of the middle before resizing", at_least=1, metavar="PIXELS"
    )
    horizontal_flip: bool = option(False, "count mirrored images as well")
    skip_bad_images: bool = option(False, "leave out unreadable images instead of stopping")
    loader: str = option("auto", "who decodes and delivers images", choices=("auto", "dali", "torch"), resumable=True)


@dataclass(kw_only=True)
class NetworksConfig(Settings):
    """The extractor, frozen, and the generator, trained."""

    extractor: str = option(
        "vgg-small", "network whose features are matched; several joined by +", metavar="NAME", methods=COMPARING
    )
    weights: tuple[str, ...] = option(
        ("pretrain",),
        "the extractor's weights: files, one for each network; 'imagenet'; 'random'; or 'pretrain' to train it on the "
        "data set first (torchvision:, timm: and efficientnet-lite0 keep their ImageNet weights)",
        metavar="FILE",
        resumable=True,
        methods=COMPARING,
    )
    extractor_bn: str = option(
        "running", "statistics of the extractor's BatchNorm", choices=("running", "batch"), methods=COMPARING
    )
    layers: int | None = option(
        None, "match at most this many layers of each network", at_least=1, metavar="K", methods=COMPARING
    )
    layers_from: str = option(
        "bottom", "count --layers from the images or from the top", choices=("bottom", "top"), methods=COMPARING
    )
    taps: str | None = option(
        None, "match only layers of these names (a glob, or several: a,b)", metavar="PATTERN", methods=COMPARING
    )
    generator: str = option("dcgan", "network that is trained", choices=("dcgan", "resnet"))
    upsampling: str = option(
        "transposed",
        "how dcgan doubles the side: transposed convolutions, or interpolation and a convolution, which draw no "
        "checkerboard; a run with bilinear doesn't repeat bit for bit on a GPU",
        choices=tuple(UPSAMPLINGS),
        since="0.2",
    )
    generator_bn: str = option(
        "global",
        "batches of the generator's BatchNorm on several ranks: all their images, or each rank its own (cheaper, and "
        "then the number of ranks changes the result)",
        choices=("global", "local"),
        since="0.2",
    )
    nz: int = option(100, "dimensions of the generator's input z", at_least=1, at_most=MAX_NZ, metavar="N")
    prior: str = option("gaussian", "law of z", choices=tuple(PRIORS), since="0.2")
    sample_bn: str = option(
        "running",
        "statistics of the generator's BatchNorm when sampling ('batch': the authors' code)",
        choices=("running", "batch"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for word in ("random", "pretrain"):
            alone = word not in self.weights or self.weights == (word,)
            require(alone, "weights", f"'{word}' is for all networks, and stands alone; only 'imagenet' is for one")


@dataclass(kw_only=True)
class MatchingConfig(Settings):
    """How features are computed: the same for every method that compares them, and the same result."""

    target: str | None = option(
        None,
        "what engine.precompute knows of the real images; computed and cached by default",
        metavar="FILE",
        resumable=True,
        methods=COMPARING,
    )
    chunk_size: int | str | None = option(
        None,
        "images that the extractor sees at once, all by default; 'auto' is as many as fit into --memory-budget",
        at_least=1,
        metavar="N|auto",
        parse=_chunk_size,
        resumable=True,
        methods=COMPARING,
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
        methods=COMPARING,
    )
    kernels: str = option(
        "auto", "backend of the fused kernels", choices=("auto", "reference", "compiled", "triton"), resumable=True
    )
    fused_ama: bool = option(
        True, "fused kernels (--kernels auto); off means plain PyTorch (--kernels reference)", resumable=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        chunk = self.chunk_size
        known = chunk == "auto" or not isinstance(chunk, str)
        require(known, "chunk_size", f"{chunk!r} is neither a number nor 'auto'")
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
class TrainingConfig(Settings):
    """The generator's training."""

    batch_size: int = option(64, "images in a minibatch", at_least=2, at_most=MOST_IMAGES, metavar="N")
    steps: int = option(1500, "training steps", at_least=1, metavar="N", resumable=True)
    lr: float = option(5e-5, "learning rate of the generator", above=0, at_most=1e30, metavar="X")
    beta1: float = option(0.5, "β1 of Adam, the generator's and that of codes", at_least=0, below=1, metavar="X")
    beta2: float = option(0.999, "β2 of Adam, the generator's and that of codes", at_least=0, below=1, metavar="X")
    generator_ema: float | tuple[float, ...] | None = option(
        None,
        "sample from this moving average of the weights; several, as in .99,.999, are kept side by side",
        above=0,
        below=1,
        metavar="DECAY",
        parse=read_decays,
    )
    recompute_generator: bool = option(
        False,
        "compute the generator's activations again in backward instead of keeping them; the same result",
        resumable=True,
    )
    amp: bool = option(False, "mixed precision")
    amp_dtype: str = option("bf16", "the low precision of --amp", choices=("bf16", "fp16"))
    float32: str = option(
        "tf32",
        "products of float32 convolutions on a GPU: 'tf32' rounds them to 11 bits and is faster, 'ieee' is what a CPU "
        "computes; a target is of one of the two",
        choices=("tf32", "ieee"),
        resumable=True,
        since="0.2",
    )
    cuda_graph: bool | None = option(
        None,
        "capture a whole step in a CUDA graph after a few, and replay it: the same result in less time (default: on a "
        "GPU with the Triton kernels)",
        resumable=True,
        since="0.2",
    )
    seed: int = option(0, "of everything random", at_least=0, at_most=2**63 - 1, metavar="N")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"), resumable=True)
    threads: int | None = option(None, "CPU threads, all cores by default", at_least=1, metavar="N", resumable=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.generator_ema = one_or_several(self.generator_ema)


@dataclass(kw_only=True)
class OutputConfig(Settings):
    """What is written, and how often."""

    log_every: int = option(10, "steps between lines of metrics.jsonl", at_least=1, metavar="N", resumable=True)
    sample_every: int = option(250, "steps between sample grids", at_least=1, metavar="N", resumable=True)
    checkpoint_every: int = option(500, "steps between checkpoints", at_least=1, metavar="N", resumable=True)
    keep_checkpoints: int = option(2, "checkpoints to keep", at_least=1, metavar="N", resumable=True)
    profile: int | None = option(
        None, "trace this many steps with torch.profiler, into profile.json", at_least=1, metavar="N", resumable=True
    )


@dataclass(kw_only=True)
class ValidationConfig(Settings):
    """Comparing samples with the real images during training; see `engine.evaluate`."""

    evaluate_every: int | None = option(None, "steps between evaluations, none by default", at_least=1, metavar="N")
    evaluate_samples: int = option(5000, "samples of each evaluation", at_least=2, at_most=MOST_IMAGES, metavar="N")
    evaluate_extractor: str | None = option(
        None, "network whose features are compared (default: Inception-v3, as for FID and KID)", metavar="NAME"
    )
    evaluate_with: tuple[str, ...] = option(
        (),
        "several networks, in place of that of --evaluate-extractor: all of them judge the same samples, and the first "
        "decides what is best; 'inception' is Inception-v3",
        metavar="NAME",
        since="0.2",
    )
    evaluate_weights: tuple[str, ...] | str | None = option(
        None,
        "weights of the network that evaluates: a file (default: its own); of several networks one for each, 'own' for "
        "its own",
        metavar="FILE",
        resumable=True,
    )
    lr_adapt: str = option(
        "none",
        "'kid': lower --lr when samples stop getting closer to the real images, by the three-sample KID test",
        choices=("none", "kid"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        weights, several = self.evaluate_weights, self.evaluate_with
        self.evaluate_weights = (weights,) if isinstance(weights, str) else weights or None
        require(self.lr_adapt == "none" or self.evaluate_every is not None, "lr_adapt", "needs --evaluate-every N")
        require(not several or self.evaluate_every is not None, "evaluate_with", "needs --evaluate-every N")
        alone = self.evaluate_extractor is None or not several
        require(alone, "evaluate_with", "names all the networks; leave out --evaluate-extractor")
        twice = next((name for name in several if several.count(name) > 1), None)
        require(twice is None, "evaluate_with", f"has {twice} twice")
        given, needed = len(self.evaluate_weights or ()), max(len(several), 1)
        wrong = f"{given} given for {needed} network{'s'[: needed - 1]}; give one for each, 'own' for its own"
        require(given in (0, needed), "evaluate_weights", wrong)

    @property
    def judges(self) -> tuple[tuple[str | None, str | None], ...]:
        """Name and file of weights of every network that evaluates. None is Inception-v3, and a network's own."""
        names: tuple[str | None, ...] = self.evaluate_with or (self.evaluate_extractor,)
        weights = tuple(self.evaluate_weights or ()) or (OWN_WEIGHTS,) * len(names)
        return tuple(
            (None if name == INCEPTION else name, None if file == OWN_WEIGHTS else file)
            for name, file in zip(names, weights, strict=True)
        )

    @property
    def named_in(self) -> str:
        """The setting that names these networks."""
        return "evaluate_with" if self.evaluate_with else "evaluate_extractor"


GROUPS: dict[str, type] = {
    "method": MethodConfig,
    "data": DataConfig,
    "networks": NetworksConfig,
    "gfmn": GfmnConfig,
    "mmd": MmdConfig,
    "frechet": FrechetConfig,
    "sinkhorn": SinkhornConfig,
    "drifting": DriftingConfig,
    "gmmn": GmmnConfig,
    "features": FeaturesConfig,
    "population": PopulationConfig,
    "critic": CriticConfig,
    "game": GameConfig,
    "denoising": DenoisingConfig,
    "moments": MomentsConfig,
    "autoencoder": AutoencoderConfig,
    "latent": LatentConfig,
    "matching": MatchingConfig,
    "training": TrainingConfig,
    "updates": UpdatesConfig,
    "output": OutputConfig,
    "validation": ValidationConfig,
}
"""Every group of settings; one with `methods` belongs to those alone."""


def group_of(name: str) -> type:
    """The group that has the field `name`; InputError if none has."""
    for group in GROUPS.values():
        if name in field_names(group):
            return group
    raise InputError(name, f"there is no setting {name!r}")


def default_of(name: str) -> Any:
    """What the field `name` is where nobody says otherwise."""
    return next(entry.default for entry in dataclasses.fields(group_of(name)) if entry.name == name)


def owners(name: str) -> tuple[str, ...]:
    """The methods that a field belongs to; () if it belongs to all."""
    group = group_of(name)
    (entry,) = (entry for entry in dataclasses.fields(group) if entry.name == name)
    return entry.metadata["methods"] or getattr(group, "methods", ())


def field_names(group: type) -> set[str]:
    """Of a group of settings."""
    return {entry.name for entry in dataclasses.fields(group)}


def names_with(key: str) -> set[str]:
    """The fields that declare `key`: "resumable", or "since"."""
    entries = (entry for group in GROUPS.values() for entry in dataclasses.fields(group))
    return {entry.name for entry in entries if entry.metadata[key]}
