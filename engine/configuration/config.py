"""The configuration of a training run, its presets, and the command line built from it.

Every field of the five groups is a flag of the same name (`batch_size` is `--batch-size`); a preset is a set of
values for some of them; what the command line gives overrides the preset.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.support.errors import InputError


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A field with what its flag needs: the help text, the choices if there are only some, how to read its text."""
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, "parse": parse})


def _require(condition: bool, flag: str, message: str) -> None:
    if not condition:
        raise InputError(f"--{flag}: {message}")


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b", re.IGNORECASE)


def memory_bytes(text: str, flag: str = "memory-budget") -> int:
    """Bytes of a size such as "12GiB" (12 · 2^30) or "800MB" (800 · 10^6); InputError if it is none."""
    match = _SIZE.fullmatch(text.strip())
    _require(
        match is not None and float(match[1]) > 0,
        flag,
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

    dataset: str = option(
        "digits", "kind of data set", choices=("digits", "cifar10", "stl10", "celeba", "lsun", "images")
    )
    data: str | None = option(
        None, "folder of images (or an archive of arrays), where the data set needs one", metavar="PATH"
    )
    image_size: int = option(32, "side of the images in pixels", metavar="PIXELS")
    center_crop: int | None = option(None, "cut this square out of the middle before resizing", metavar="PIXELS")
    horizontal_flip: bool = option(False, "count mirrored images as well")
    skip_bad_images: bool = option(False, "leave out unreadable images instead of stopping")
    loader: str = option("auto", "who decodes and delivers images", choices=("auto", "dali", "torch"))

    def __post_init__(self) -> None:
        _require(self.image_size >= 8, "image-size", f"must be at least 8, got {self.image_size}")
        _require(self.center_crop is None or self.center_crop > 0, "center-crop", "must be positive")


@dataclass(kw_only=True)
class NetworksConfig:
    """The extractor, frozen, and the generator, trained."""

    extractor: str = option("vgg-small", "network whose features are matched; several joined by +", metavar="NAME")
    weights: tuple[str, ...] = option(
        ("pretrain",),
        "the extractor's weights: files, one for each network; 'imagenet'; 'random'; or 'pretrain' to train it on the "
        "data set first (torchvision:, timm: and efficientnet-lite0 keep their ImageNet weights)",
        metavar="FILE",
    )
    extractor_bn: str = option("running", "statistics of the extractor's BatchNorm", choices=("running", "batch"))
    layers: int | None = option(None, "match at most this many layers of each network", metavar="K")
    layers_from: str = option("bottom", "count --layers from the images or from the top", choices=("bottom", "top"))
    taps: str | None = option(None, "match only layers of these names (a glob, or several: a,b)", metavar="PATTERN")
    generator: str = option("dcgan", "network that is trained", choices=("dcgan", "resnet"))
    nz: int = option(100, "dimensions of the generator's input z", metavar="N")
    sample_bn: str = option(
        "running",
        "statistics of the generator's BatchNorm when sampling ('batch': the authors' code)",
        choices=("running", "batch"),
    )

    def __post_init__(self) -> None:
        _require(self.nz >= 1, "nz", f"must be at least 1, got {self.nz}")
        _require(self.layers is None or self.layers >= 1, "layers", f"must be at least 1, got {self.layers}")


@dataclass(kw_only=True)
class MatchingConfig:
    """How moments are matched."""

    averager: str = option("ama", "what smooths the differences of moments", choices=("ama", "ma", "none"))
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
    chunk_size: int | str | None = option(
        None,
        "images that the extractor sees at once, all by default; 'auto' is as many as fit into --memory-budget",
        metavar="N|auto",
        parse=_chunk_size,
    )
    memory_budget: str | None = option(
        None,
        "memory of the device that a step may need, weights included, such as 12GiB or 800MB; for --chunk-size auto "
        "(default: most of what is free), --plan, and as a limit for fixed chunks",
        metavar="SIZE",
    )
    checkpoint: str = option(
        "none",
        "'stages': keep the extractor's activations at a few places only and compute the others again in backward, "
        "stage by stage; less memory and more time, the same result",
        choices=("none", "stages"),
    )
    kernels: str = option("auto", "backend of the fused kernels", choices=("auto", "reference", "compiled", "triton"))
    fused_ama: bool = option(True, "fused kernels (--kernels auto); off means plain PyTorch (--kernels reference)")

    def __post_init__(self) -> None:
        _require(self.ama_lr > 0, "ama-lr", f"must be positive, got {self.ama_lr}")
        _require(self.ma_alpha is None or 0 < self.ma_alpha <= 1, "ma-alpha", f"must be in (0, 1], got {self.ma_alpha}")
        _require(self.correction in (0, 1), "correction", f"must be 0 or 1, got {self.correction}")
        chunk = self.chunk_size
        known = chunk == "auto" or not isinstance(chunk, str)
        _require(known, "chunk-size", f"{chunk!r} is neither a number nor 'auto'")
        _require(not isinstance(chunk, int) or chunk >= 1, "chunk-size", f"must be at least 1, got {chunk}")
        if self.memory_budget is not None:
            memory_bytes(self.memory_budget)
        contradiction = not self.fused_ama and self.kernels in ("compiled", "triton")
        _require(not contradiction, "no-fused-ama", f"contradicts --kernels {self.kernels}")

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
    steps: int = option(1500, "training steps", metavar="N")
    lr: float = option(5e-5, "learning rate of the generator's Adam", metavar="X")
    beta1: float = option(0.5, "β1 of the generator's Adam", metavar="X")
    beta2: float = option(0.999, "β2 of the generator's Adam", metavar="X")
    generator_ema: float | None = option(None, "sample from this moving average of the weights", metavar="DECAY")
    checkpoint_generator: bool = option(
        False, "compute the generator's activations again in backward instead of keeping them; the same result"
    )
    amp: bool = option(False, "mixed precision")
    amp_dtype: str = option("bf16", "the low precision of --amp", choices=("bf16", "fp16"))
    seed: int = option(0, "of everything random", metavar="N")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(None, "CPU threads, all cores by default", metavar="N")

    def __post_init__(self) -> None:
        _require(
            self.batch_size >= 2, "batch-size", f"a minibatch of {self.batch_size} has no variance; give at least 2"
        )
        _require(self.steps >= 1, "steps", f"must be at least 1, got {self.steps}")
        _require(self.lr > 0, "lr", f"must be positive, got {self.lr}")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, f"must be in [0, 1), got {getattr(self, name)}")
        decay = self.generator_ema
        _require(decay is None or 0 < decay < 1, "generator-ema", f"must be between 0 and 1, got {decay}")
        _require(0 <= self.seed < 2**63, "seed", f"must be from 0 to 2^63 − 1, got {self.seed}")
        _require(self.threads is None or self.threads >= 1, "threads", f"must be at least 1, got {self.threads}")


@dataclass(kw_only=True)
class OutputConfig:
    """What is written, and how often."""

    target: str | None = option(
        None, "target moments from engine.precompute; computed and cached by default", metavar="FILE"
    )
    log_every: int = option(10, "steps between lines of metrics.jsonl", metavar="N")
    sample_every: int = option(250, "steps between sample grids", metavar="N")
    checkpoint_every: int = option(500, "steps between checkpoints", metavar="N")
    keep_checkpoints: int = option(2, "checkpoints to keep", metavar="N")
    profile: int | None = option(None, "trace this many steps with torch.profiler, into profile.json", metavar="N")

    def __post_init__(self) -> None:
        for name in ("log_every", "sample_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            _require(value >= 1, name.replace("_", "-"), f"must be at least 1, got {value}")
        _require(self.profile is None or self.profile >= 1, "profile", f"must be at least 1, got {self.profile}")


@dataclass(kw_only=True)
class ValidationConfig:
    """Comparing samples with the real images during training; see `engine.evaluate`."""

    evaluate_every: int | None = option(None, "steps between evaluations, none by default", metavar="N")
    evaluate_samples: int = option(5000, "samples of each evaluation", metavar="N")
    evaluate_extractor: str | None = option(
        None, "network whose features are compared (default: Inception-v3, as for FID and KID)", metavar="NAME"
    )
    evaluate_weights: str | None = option(None, "weights of that network: a file (default: its own)", metavar="FILE")
    lr_adapt: str = option(
        "none",
        "'kid': lower --lr when samples stop getting closer to the real images, by the three-sample KID test",
        choices=("none", "kid"),
    )

    def __post_init__(self) -> None:
        every = self.evaluate_every
        _require(every is None or every >= 1, "evaluate-every", f"must be at least 1, got {every}")
        samples = self.evaluate_samples
        _require(samples >= 2, "evaluate-samples", f"must be at least 2, got {samples}")
        adapts = self.lr_adapt != "none"
        _require(not adapts or every is not None, "lr-adapt", "needs --evaluate-every N")


_GROUPS: dict[str, type] = {
    "data": DataConfig,
    "networks": NetworksConfig,
    "matching": MatchingConfig,
    "training": TrainingConfig,
    "output": OutputConfig,
    "validation": ValidationConfig,
}

_PAPER = {"weights": (), "steps": 200_000, "sample_every": 1000, "checkpoint_every": 5000, "log_every": 100}
PRESETS: dict[str, dict[str, Any]] = {
    # The embedded demo: larger rates than the paper's and averaged weights, as it has minutes and not days. At such
    # rates the authors' AMA keeps all classes, and variety within each; the paper's lets the rarest one thin out.
    "digits": {
        "steps": 900,
        "lr": 1e-3,
        "ama_lr": 1e-3,
        "ama_variant": "authors",
        "generator_ema": 0.99,
        "sample_every": 150,
        "checkpoint_every": 300,
    },
    # The paper's settings (section 5.1): Adam at 5e-5, AMA at 1e-5, minibatch 64, z of 100 dimensions.
    "cifar10": {**_PAPER, "dataset": "cifar10", "extractor": "vgg19+resnet18"},
    "stl10": {**_PAPER, "dataset": "stl10", "extractor": "vgg19+resnet18"},
    "celeba64": {**_PAPER, "dataset": "celeba", "extractor": "vgg19", "image_size": 64, "center_crop": 160},
    "celeba128": {
        **_PAPER,
        "dataset": "celeba",
        "extractor": "vgg19",
        "image_size": 128,
        "center_crop": 160,
        "generator": "resnet",
    },
    "lsun64": {**_PAPER, "dataset": "lsun", "extractor": "vgg19", "image_size": 64},
}

# What may change when a run is resumed: where and how it runs, never what it computes.
_RESUMABLE = {
    "steps",
    "device",
    "threads",
    "kernels",
    "fused_ama",
    "chunk_size",
    "memory_budget",
    "checkpoint",
    "checkpoint_generator",
    "data",
    "loader",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "profile",
}


@dataclass(kw_only=True)
class Config:
    """Everything that a run is made from; `config.json` holds it."""

    preset: str = "digits"
    data: DataConfig = field(default_factory=DataConfig)
    networks: NetworksConfig = field(default_factory=NetworksConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        chunk, batch = self.matching.chunk_size, self.training.batch_size
        larger = isinstance(chunk, int) and chunk > batch
        _require(not larger, "chunk-size", f"is larger than the minibatch: {chunk} > {batch}")
        batched = self.networks.extractor_bn == "batch"
        _require(
            not (batched and isinstance(chunk, int)),
            "chunk-size",
            "batch statistics (--extractor-bn batch) need the whole minibatch at once",
        )

    @classmethod
    def build(cls, preset: str, given: Mapping[str, Any]) -> Config:
        """The preset's configuration with the `given` flags (field name → value) in place of its own."""
        if preset not in PRESETS:
            raise InputError(f"--preset: {preset!r} is not one of {', '.join(PRESETS)}")
        values = {**PRESETS[preset], **_absolute(given)}
        if given.get("data") is not None and "dataset" not in given and values.get("dataset", "digits") == "digits":
            values["dataset"] = "images"
        groups = {name: group(**_part(group, values)) for name, group in _GROUPS.items()}
        return cls(preset=preset, **groups)

    def replaced(self, given: Mapping[str, Any]) -> Config:
        """This configuration with `given` flags in place of its own."""
        flat = {**self.flat(), **_absolute(given)}
        return Config(preset=self.preset, **{name: group(**_part(group, flat)) for name, group in _GROUPS.items()})

    def with_flags(self, given: Mapping[str, Any]) -> Config:
        """This configuration, of a run to be resumed, with `given` flags that a resumed run may change."""
        flat = self.flat()
        free = set(_RESUMABLE)
        if self.validation.evaluate_every is None:
            free |= {entry.name for entry in dataclasses.fields(ValidationConfig) if entry.name != "lr_adapt"}
        for name, value in _absolute(given).items():
            if name not in free and flat[name] != value:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag}: the run was started with {flat[name]}, it cannot be resumed with {value}")
        return self.replaced(given)

    def flat(self) -> dict[str, Any]:
        """Field name → value, over all groups."""
        return {key: value for name in _GROUPS for key, value in dataclasses.asdict(getattr(self, name)).items()}

    def to_json(self) -> str:
        """As in `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read a `config.json`; InputError that names the file if it is not one."""
        try:
            values = json.loads(Path(path).read_text())
            values.setdefault("validation", {})  # runs made before there was one
            groups = {name: group(**_tuples(values[name])) for name, group in _GROUPS.items()}
            return cls(preset=values["preset"], **groups)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; is this the folder of a run?") from None
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise InputError(f"{path}: is not the configuration of a run ({error})") from None


def _part(group: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in dataclasses.fields(group)}
    return {name: value for name, value in values.items() if name in names}


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    """Files and folders among the given flags by their whole path, so that a run can be resumed from anywhere."""
    values = dict(given)
    for name in ("data", "target"):
        if values.get(name) is not None:
            values[name] = str(Path(values[name]).expanduser().absolute())
    weights = values.get("evaluate_weights")
    if weights is not None and Path(weights).expanduser().exists():
        values["evaluate_weights"] = str(Path(weights).expanduser().absolute())
    if "weights" in values:
        files = (Path(entry).expanduser() for entry in values["weights"])
        values["weights"] = tuple(
            str(file.absolute()) if file.exists() else entry
            for file, entry in zip(files, values["weights"], strict=True)
        )
    return values


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """One flag for every field of the named groups, or of all. Only flags that were given appear in the result."""
    for name in names or _GROUPS:
        group = _GROUPS[name]
        section = parser.add_argument_group(name, (group.__doc__ or "").strip())
        hints = typing.get_type_hints(group)
        for entry in dataclasses.fields(group):
            flag = "--" + entry.name.replace("_", "-")
            default = "" if entry.default in (None, ()) else f" (default: {_shown(entry.default)})"
            help_text = (entry.metadata["help"] + default).replace("%", "%%")
            if hints[entry.name] is bool:
                action: Any = argparse.BooleanOptionalAction
                section.add_argument(flag, action=action, default=argparse.SUPPRESS, help=help_text)
                continue
            base, several = _scalar(hints[entry.name])
            section.add_argument(
                flag,
                type=entry.metadata["parse"] or base,
                nargs="+" if several else None,
                choices=entry.metadata["choices"],
                metavar=entry.metadata["metavar"],
                default=argparse.SUPPRESS,
                help=help_text,
            )


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration's fields among parsed arguments: those that were given."""
    names = {entry.name for group in _GROUPS.values() for entry in dataclasses.fields(group)}
    return _tuples({name: value for name, value in vars(arguments).items() if name in names})


def _shown(value: Any) -> Any:
    return " ".join(value) if isinstance(value, tuple) else value


def _scalar(hint: Any) -> tuple[type, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
