"""From a configuration to what is compared: the reference's kind, and the objective of generated images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engine.comparison.averagers import AMA, AVERAGERS, Averager, MovingAverage
from engine.comparison.distances import MMD, Frechet, LandmarkMMD, Sinkhorn, drifting, kernels
from engine.comparison.distances.kernels import Energy, Kernel
from engine.comparison.distances.moments import Moments
from engine.comparison.distances.tiled import bound_mmd
from engine.comparison.moment_matching import MomentMatching, feature_weights
from engine.comparison.on_features import Discrepancy, OfNetworks, OnFeatures
from engine.comparison.pooling import Grid, make_pool, sizes
from engine.comparison.populations import MovingCovariance, MovingPopulation, QueuedFeatures, QueuedPopulation
from engine.comparison.reference.bank import BankKind, FeatureBank
from engine.comparison.reference.covariance import CovarianceKind, FeatureCovariance
from engine.comparison.reference.landmarks import FeatureLandmarks, LandmarksKind
from engine.comparison.reference.protocols import Kind
from engine.comparison.reference.target import MomentsKind, fake_target
from engine.configuration.config import Config
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import chosen_backend
from engine.representation.protocols import Objective
from engine.support.errors import InputError

_GMMN_PIXELS = 784
"""The features that GMMN's bandwidths were published for."""
_GMMN_FLOOR = 1e-8
_MOST_MOVING = 4096
Bound = Callable[[Config, Tensor, str | ModuleType], Discrepancy]
"""From real features [M, F] to the distance of generated ones from them, by the fused kernels of a backend."""
Make = Callable[[Config, Extractor, Any, dict[str, Any]], Objective]


def make_averager(config: Config) -> Averager:
    """The configured averager or population, before its first step."""
    gfmn, population = config.gfmn, config.population
    if population.population == "ema":
        return MovingPopulation(population.population_decay)
    if population.population == "queue":
        return QueuedPopulation(population.population_images // config.training.batch_size)
    if gfmn.averager == "ama":
        return AMA(lr=gfmn.ama_lr, variant=gfmn.ama_variant, seed=config.training.seed)
    if gfmn.averager == "ma":
        return MovingAverage(alpha=gfmn.ma_alpha, variant=gfmn.ma_variant)
    return AVERAGERS[gfmn.averager]()


def _moments_kind(config: Config, extractor: Extractor) -> Kind[Any]:
    return MomentsKind()


def _covariance_kind(config: Config, extractor: Extractor) -> Kind[Any]:
    return CovarianceKind(config.features.pool)


def _bank_kind(config: Config, extractor: Extractor) -> BankKind:
    name = config.method.method
    return BankKind(config.features.pool, config.flat()[f"{name}_images"])


def _mmd_kind(config: Config, extractor: Extractor) -> Kind[Any]:
    bank, landmarks = _bank_kind(config, extractor), config.mmd.mmd_landmarks
    if landmarks is None:
        return bank
    parts = _parts(config, extractor, sizes(make_pool(config.features.pool), extractor.taps))
    return LandmarksKind(bank, landmarks, _kernel(config), tuple(parts), config.training.seed)


def _moment_matching(config: Config, extractor: Extractor, target: Any, options: dict[str, Any]) -> Objective:
    assert isinstance(target, Moments)
    correction = config.gfmn.correction
    if config.gfmn.feature_scale == "target-deviation" and "weights" not in options:
        options = {**options, "weights": feature_weights(target, correction)}
    return MomentMatching(extractor, target, make_averager(config), correction=correction, **options)


def _kernel(config: Config) -> Kernel:
    settings = config.mmd
    factory = kernels.KERNELS[settings.mmd_kernel]
    if settings.mmd_kernel == "polynomial":
        return factory(settings.mmd_degree)
    return factory(settings.bandwidths) if settings.bandwidths else factory()


def _mmd(config: Config, extractor: Extractor, known: Any, options: dict[str, Any]) -> Objective:
    make = _on_landmarks if isinstance(known, FeatureLandmarks) else _on_bank(_mmd_of_images)
    return make(config, extractor, known, options)


def _mmd_of_images(config: Config, real: Tensor, backend: str | ModuleType) -> Discrepancy:
    kernel, unbiased = _kernel(config), config.mmd.mmd_unbiased
    if config.matching.backend == "reference":  # it has no tiles, and MMD's blocks are less than a whole matrix
        return MMD(real, kernel, unbiased)
    return bound_mmd(
        real, kernel, config.training.batch_size, unbiased, chosen_backend(backend, real.device, real.dtype)
    )


def _on_landmarks(config: Config, extractor: Extractor, known: Any, options: dict[str, Any]) -> Objective:
    assert isinstance(known, FeatureLandmarks)
    device, kernel, unbiased = extractor.device, _kernel(config), config.mmd.mmd_unbiased
    distances = [
        LandmarkMMD.of_weights(points.to(device), weights.to(device), kernel, unbiased)
        for points, weights in zip(known.points, known.weights, strict=True)
    ]
    parts = _spans(points.shape[1] for points in known.points)
    distance = OfNetworks(distances, parts, known.scales.to(device))
    return OnFeatures(extractor, distance, pool=config.features.pool, **options)


def _sinkhorn(config: Config, real: Tensor, backend: str | ModuleType) -> Discrepancy:
    return Sinkhorn(real, config.sinkhorn.sinkhorn_epsilon, config.sinkhorn.sinkhorn_iterations, tolerance=None)


def _drifting(config: Config, real: Tensor, backend: str | ModuleType) -> Discrepancy:
    return lambda x: drifting(x, real, config.drifting.drifting_temperatures)


def _gmmn(config: Config, real: Tensor, backend: str | ModuleType) -> Discrepancy:
    """√(MMD² + ε): ε keeps the gradient of the root finite where the two sets are alike."""
    share = real.shape[1] / _GMMN_PIXELS
    distance = MMD(real, kernels.gaussian([math.sqrt(width * share) for width in config.gmmn.gmmn_bandwidths]))
    return lambda x: (distance(x).clamp_min(0) + _GMMN_FLOOR).sqrt()  # rounding may leave a sum of kernels below 0


def _on_bank(bound: Bound, *, scaled: bool = True) -> Make:
    """An objective that compares with a bank of real images.

    Args:
        bound: makes the distance.
        scaled: first every tap's features are divided so that all taps count alike, and then all so that the median
            distance between real images is 1, which is the unit of bandwidths.
    """

    def make(config: Config, extractor: Extractor, bank: Any, options: dict[str, Any]) -> Objective:
        assert isinstance(bank, FeatureBank)
        options = dict(options)
        scales, parts = options.pop("scales", None), _parts(config, extractor, bank.sizes)
        if scales is None:
            scales = bank.unit_scales(parts) if scaled else torch.ones_like(bank.features[0])
        scales = scales.to(extractor.device)
        real = bank.features.to(extractor.device) * scales
        of_parts = [real[:, part].contiguous() if len(parts) > 1 else real for part in parts]
        distance = OfNetworks([bound(config, part, options["kernels"]) for part in of_parts], parts, scales)
        return OnFeatures(extractor, distance, pool=config.features.pool, **options)

    return make


def _parts(config: Config, extractor: Extractor, sizes: Sequence[int]) -> list[slice]:
    """The pooled features that are compared together: all, or with `--normalise-losses` each network's own."""
    if not config.features.normalise_losses:
        return [slice(0, sum(sizes))]
    return _spans(sum(sizes[tap] for tap in taps) for taps in extractor.taps_of_networks())


def _spans(sizes: Iterable[int]) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def _frechet(config: Config, extractor: Extractor, known: Any, options: dict[str, Any]) -> Objective:
    """Of all real images: of their covariance, or of what it is made of where that is less."""
    assert isinstance(known, FeatureBank | FeatureCovariance)
    options = dict(options)
    scales = options.pop("scales", None)
    parts = _parts(config, extractor, known.sizes)
    if scales is None:
        scales = known.scales()
        if not all(bool((scales[part] > 0).any()) for part in parts):
            raise InputError("data", "the method needs real images that differ, and these are the same")
    scales = scales.to(extractor.device)
    distances = [_of_population(config, _bound_frechet(known, part, scales[part]), scales[part]) for part in parts]
    # Which have the scales: another copy of the features, scaled, would be a tenth of a step's memory.
    distance = OfNetworks(distances, parts, None)
    return OnFeatures(extractor, distance, pool=config.features.pool, **options)


def _bound_frechet(known: FeatureBank | FeatureCovariance, part: slice, scales: Tensor) -> Frechet:
    if isinstance(known, FeatureBank):
        return Frechet.of(known.features[:, part].to(scales.device), scales)
    mean, m2 = known.mean[part].to(scales.device), known.m2[part, part].to(scales.device)
    return Frechet(mean, m2, scales, images=known.count)


def _of_population(config: Config, distance: Frechet, scales: Tensor) -> Discrepancy:
    """The distance of what `--population` says, and not of the minibatch alone."""
    settings, features = config.population, len(scales)
    if settings.population == "queue":
        others = settings.population_images - config.training.batch_size
        return QueuedFeatures(distance, others, features, scales)
    if settings.population == "none":
        return distance
    return MovingCovariance(distance.of_moments, settings.population_decay, features, scales)


_KINDS: dict[str, Callable[[Config, Extractor], Kind[Any]]] = {
    "gfmn": _moments_kind,
    "mmd": _mmd_kind,
    "frechet": _covariance_kind,
    "sinkhorn": _bank_kind,
    "drifting": _bank_kind,
    "gmmn": _bank_kind,
}
_OBJECTIVES: dict[str, Make] = {
    "gfmn": _moment_matching,
    "mmd": _mmd,
    "frechet": _frechet,
    "sinkhorn": _on_bank(_sinkhorn),
    "drifting": _on_bank(_drifting),
    "gmmn": _on_bank(_gmmn, scaled=False),
}


def _pass_options(config: Config, dtype: torch.dtype | None) -> dict[str, Any]:
    """What every objective takes of the settings on how features are computed."""
    matching = config.matching
    return {
        "chunk_size": matching.images_per_chunk,
        "kernels": matching.backend,
        "recompute": matching.recompute,
        "amp_dtype": dtype,
    }


def reference_kind(config: Config, extractor: Extractor) -> Kind[Any]:
    """What the configured method has to know of the real images."""
    return _KINDS[config.method.method](config, extractor)


def _check_images(config: Config, images: int) -> None:
    """InputError if so many real images are too few for the configured method."""
    method, landmarks = config.method.method, config.mmd.mmd_landmarks
    least, more = (1 + config.gfmn.correction, ", or --correction 0") if method == "gfmn" else (2, "")
    if images < least:
        what = {"gfmn": "has no variance", "frechet": "has no covariance"}.get(
            method, f"is too few for --method {method}"
        )
        raise InputError("data", f"{images} usable image {what}; give at least 2{more}")
    if method == "mmd" and landmarks is not None and landmarks > images:
        raise InputError("mmd_landmarks", f"must be from 1 to the number of images, {images}; got {landmarks}")


def check_features(config: Config, extractor: Extractor, images: int) -> None:
    """InputError if the configured method can't compare what the extractor's taps give, by their shapes alone.

    Args:
        extractor: with any weights.
        images: of the data set.
    """
    _check_images(config, images)
    gfmn, pool = config.method.method == "gfmn", make_pool(config.features.pool)
    if extractor.tokens and gfmn:
        raise InputError(
            "method",
            f"gfmn matches variances at every place of a map, and {extractor.name} has tokens; use another method "
            "with --pool mean, such as mmd",
        )
    if extractor.tokens and not gfmn and isinstance(pool, Grid) and pool.side > 1:
        raise InputError(
            "pool",
            f"{config.features.pool} is of a map's places, and {extractor.name} has tokens; choose mean or mean+std",
        )
    kind = None if gfmn else reference_kind(config, extractor)
    if not isinstance(kind, CovarianceKind):
        return
    kind.is_covariance(extractor, images)
    features = sizes(pool, extractor.taps)
    largest = max(part.stop - part.start for part in _parts(config, extractor, features))
    if config.population.population == "ema" and largest > _MOST_MOVING:
        raise InputError(
            "population",
            f"a moving covariance of {largest:,} features takes too long at every step, {_MOST_MOVING:,} is the most; "
            "choose 'queue', or a coarser --pool",
        )


def blank_reference(
    config: Config, extractor: Extractor, fill: Callable[..., Tensor] = torch.zeros, images: int | None = None
) -> Any:
    """What the configured method would know of `images` real images, of none: `fill(*shape)` in place of numbers.

    For models and traces of a step, which look at shapes alone. By default of as many images as can matter.
    """
    kind = reference_kind(config, extractor)
    if isinstance(kind, MomentsKind):
        return fake_target(extractor.num_features, fill)
    features = sizes(make_pool(config.features.pool), extractor.taps)
    if isinstance(kind, LandmarksKind):
        count = kind.landmarks + isinstance(kind.kernel, Energy)  # whose landmarks have a centre besides
        points = [fill(count, part.stop - part.start) for part in kind.parts]
        weights = [fill(count, dtype=torch.float64) for _ in points]
        return FeatureLandmarks(kind.bank.at_most, points, weights, fill(sum(features)))
    most = kind.at_most if isinstance(kind, BankKind) else sum(features)
    count = most if images is None else min(images, most)
    return FeatureBank(fill(count, sum(features)), torch.zeros(count, dtype=torch.int64), features)


def make_objective(
    config: Config, extractor: Extractor, reference: Any, dtype: torch.dtype | None, **options: Any
) -> Objective:
    """The configured method's loss of generated images.

    Args:
        reference: of `reference_kind`.
        dtype: low precision of the extractor's arithmetic, None for its own.
        options: take the place of what the configuration says for the objective's arguments of these names.
    """
    check_features(config, extractor, reference.count)
    make = _OBJECTIVES[config.method.method]
    return make(config, extractor, reference, {**_pass_options(config, dtype), **options})
