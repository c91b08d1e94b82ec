"""FID, KID, Inception score, precision and recall, all by torch-fidelity, on Inception or on a network of ours.

network = evaluation_network(None, image_size=32)                         # judges.py: torch-fidelity's Inception-v3
compute_metrics(generated, real, network, ("fid", "kid"), device="cuda")  # uint8 [N, 3, 32, 32], or folders

Nothing here knows what a generator is trained for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.evaluation.fidelity import fidelity
from engine.evaluation.image_set import ImageSet, shown_size
from engine.evaluation.judges import VGG16, EvaluationNetwork, download_judges
from engine.support.errors import InputError
from pipelines.errors import DataError
from pipelines.memory import memory_limit

log = logging.getLogger("gfmn")

METRICS = ("fid", "kid", "is", "prc")
SEED = 2020
"""torch-fidelity's own default: with it, numbers are those of the command `fidelity`."""
KID_SUBSET = 1000
"""Images in each of KID's subsets, as torch-fidelity has them."""
_IS_SPLITS, _NEIGHBOURS = 10, 3
_KEYS = {
    "frechet_inception_distance": "frechet_distance",
    "kernel_inception_distance_mean": "kernel_distance",
    "kernel_inception_distance_std": "kernel_distance_std",
    "inception_score_mean": "classifier_score",
    "inception_score_std": "classifier_score_std",
    "precision": "precision",
    "recall": "recall",
}


def compute_metrics(
    generated: Tensor | str | Path | ImageSet,
    real: Tensor | str | Path | ImageSet | None,
    network: EvaluationNetwork,
    metrics: Sequence[str] = ("fid", "kid"),
    *,
    device: str | torch.device,
    batch_size: int = 128,
    seed: int = SEED,
    kid_subset_size: int | None = None,
    progress: bool = False,
    real_cache: Path | None = None,
) -> dict[str, float]:
    """The metrics of `generated` against `real` images: uint8 [N, 3, H, W] each, or the path of a folder.

    Everything is torch-fidelity's, with its defaults. As there, Inception's precision and recall come from VGG16's
    features; any other network computes all metrics. The caller's random numbers are left alone.

    Args:
        generated: the images that are judged.
        real: what they are compared with; the metric "is" alone needs none.
        network: from `evaluation_network`.
        metrics: some of `METRICS`.
        device: where the network runs.
        batch_size: images at a time; it may change the last bits of features, and nothing else.
        seed: of KID's subsets and of the shuffling before the splits of "is".
        kid_subset_size: images in each of KID's 100 subsets; None is torch-fidelity's 1,000.
        progress: show progress on stderr.
        real_cache: an existing folder that keeps the features of `real` for calls with the same real images.

    Returns what was asked for: frechet_distance ("fid"), kernel_distance and kernel_distance_std ("kid"),
    classifier_score and classifier_score_std ("is"), precision and recall ("prc"), whatever the network.

    Raises InputError: "metrics" or "kid_subset_size" for what `check_metrics` refuses or a download that fails,
    "generated" (or its folder) for sizes that differ, the file's path for one that cannot be decoded.
    """
    generated = generated if isinstance(generated, ImageSet) else ImageSet(generated, "generated")
    if real is not None and not isinstance(real, ImageSet):
        real = ImageSet(real, "real")
    counts = (generated.count, None if real is None else real.count)
    check_metrics(metrics, network, *counts, kid_subset_size)
    check_sizes(network, generated, real)
    download_judges(network, metrics)
    fewest = min(count for count in counts if count is not None)
    if "fid" in metrics and fewest <= network.num_features:
        _warn_of_bias(fewest, network.num_features)
    device = torch.device(device)
    inputs = [generated] if real is None or set(metrics) == {"is"} else [generated, real]
    # Images in memory need no processes that read them; distances between very many images need the sparing way.
    in_memory = any(entry.in_memory for entry in inputs)
    options: dict[str, Any] = {
        **{f"input{number}": entry.source for number, entry in enumerate(inputs, start=1)},
        "cuda": device.type == "cuda",
        "batch_size": batch_size,
        "kid_subset_size": KID_SUBSET if kid_subset_size is None else kid_subset_size,
        "rng_seed": seed,
        "save_cpu_ram": in_memory or not _distances_fit(max(entry.count for entry in inputs)),
        "cache": real_cache is not None,
        "cache_root": real_cache and str(real_cache),
        "input2_cache_name": real_cache and "real",
        "verbose": progress,
    }
    calls = [(network.name, tuple(metrics))]
    if network.is_inception and "prc" in metrics:
        calls = [(network.name, tuple(metric for metric in metrics if metric != "prc")), (VGG16, ("prc",))]
    found: dict[str, float] = {}
    with _quiet(device):
        for extractor, names in calls:
            if names:
                wanted = {("isc" if metric == "is" else metric): metric in names for metric in METRICS}
                found |= _calculate(inputs, extractor, options | wanted)
    return common_names(found)


def common_names(found: Mapping[str, float]) -> dict[str, float]:
    """torch-fidelity's numbers under names that say nothing of Inception; others are left out."""
    return {name: found[key] for key, name in _KEYS.items() if key in found}


def check_names(metrics: Sequence[str]) -> None:
    """Raise InputError on `metrics` unless each of them is known, and there is one."""
    for metric in metrics:
        if metric not in METRICS:
            raise InputError("metrics", f"{metric!r} is not one of {', '.join(METRICS)}")
    if not metrics:
        raise InputError("metrics", f"name at least one of {', '.join(METRICS)}")


def check_metrics(
    metrics: Sequence[str],
    network: EvaluationNetwork,
    generated: int,
    real: int | None,
    kid_subset_size: int | None = None,
) -> None:
    """Raise InputError if `network` has no scores, or there are too few images, for any of `metrics`.

    Args:
        metrics: some of `METRICS`, at least one.
        network: from `evaluation_network`.
        generated, real: numbers of images; None if there are no real ones.
        kid_subset_size: as in `compute_metrics`.

    The error names `metrics` or `kid_subset_size`.
    """
    check_names(metrics)
    if "is" in metrics and not network.has_classifier:
        raise InputError("metrics", f"'is' needs a classifier, which {network.label} with these weights is not")
    if kid_subset_size is not None and kid_subset_size < 2:
        raise InputError("kid_subset_size", f"must be at least 2, got {kid_subset_size}")
    subset = KID_SUBSET if kid_subset_size is None else kid_subset_size
    needed = {"fid": 2, "kid": subset, "is": _IS_SPLITS, "prc": _NEIGHBOURS + 1}
    for metric in metrics:
        counts = [(generated, "generated")]
        if metric != "is":
            if real is None:
                raise InputError("metrics", f"{metric} compares with real images, and there are none")
            counts.append((real, "real"))
        for count, kind in counts:
            if count < needed[metric]:
                hint = "; smaller subsets are possible, and another metric" if metric == "kid" else ""
                raise InputError(
                    "metrics", f"{metric} needs at least {needed[metric]} {kind} images, there are {count}{hint}"
                )


def check_sizes(network: EvaluationNetwork, generated: ImageSet, real: ImageSet | None) -> None:
    """Raise InputError that names `generated` unless all images have one size, and one that `network` takes."""
    size = shown_size(generated.size)
    if real is not None and generated.size != real.size:
        raise InputError(
            generated.argument,
            f"images are {size} pixels, but those of {real.name} are {shown_size(real.size)}; bring both to one size "
            "first",
        )
    expected = (network.image_size, network.image_size)
    if network.image_size is not None and generated.size != expected:
        raise InputError(
            generated.argument,
            f"images are {size} pixels, but {network.label} was made for {network.image_size}×{network.image_size}",
        )


def _calculate(images: list[ImageSet], extractor: str, options: dict[str, Any]) -> dict[str, float]:
    try:
        return fidelity().calculate_metrics(feature_extractor=extractor, **options)
    except (OSError, DataError):  # of a process that reads, with its stack in the message
        damaged = next(filter(None, (entry.damaged_file() for entry in images)), None)
        if damaged is None:
            raise
        raise InputError(Path(damaged.path), f"cannot be decoded ({damaged.reason}); replace or remove it") from None


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Nothing of torch-fidelity's on stdout, the caller's random numbers untouched, its CUDA device the one given."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with (
        contextlib.redirect_stdout(sys.stderr),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        on_device,
    ):
        # It reads files in four processes, however few cores there are.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


@functools.cache
def _warn_of_bias(images: int, num_features: int) -> None:
    """Once for the same numbers, not at every evaluation of a run."""
    log.warning(
        "a Fréchet distance of %d images with %d features is biased upwards (their covariance is singular): compare it "
        "only with others of as many images",
        images,
        num_features,
    )


def _distances_fit(count: int) -> bool:
    """Whether all distances between as many images, as precision and recall need them, fit into half of the memory."""
    return 4 * 4 * count**2 < memory_limit() / 2
