"""From a configuration to what is compared: the reference's kind, and the objective of generated images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from engine.comparison.averagers import AMA, AVERAGERS, Averager, MovingAverage
from engine.comparison.distances import MMD, Frechet, LandmarkMMD, Sinkhorn, drifting, kernels
from engine.comparison.distances.moments import Moments
from engine.comparison.distances.tiled import bound_mmd
from engine.comparison.moment_matching import MomentMatching, feature_weights
from engine.comparison.on_features import Discrepancy, OfNetworks, OnFeatures
from engine.comparison.pooling import make_pool, sizes
from engine.comparison.populations import MovingCovariance, MovingPopulation, QueuedFeatures, QueuedPopulation
from engine.comparison.reference.bank import BankKind, FeatureBank
from engine.comparison.reference.covariance import CovarianceKind, FeatureCovariance
from engine.comparison.reference.protocols import Kind
from engine.comparison.reference.target import MomentsKind
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.representation.extractor import Extractor
from engine.representation.protocols import Objective
from engine.support.errors import InputError

_GMMN_PIXELS = 784
"""The features that GMMN's bandwidths were published for."""
_GMMN_FLOOR = 1e-8
_MOST_MOVING = 4096
Bound = Callable[[Config, Tensor], Discrepancy]
"""From real features [M, F] to the distance of generated ones from them."""
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


def _moments_kind(config: Config) -> Kind[Any]:
    return MomentsKind()


def _covariance_kind(config: Config) -> Kind[Any]:
    return CovarianceKind(config.features.pool)


def _bank_kind(config: Config) -> Kind[Any]:
    name = config.method.method
    return BankKind(config.features.pool, config.flat()[f"{name}_images"])


def _moment_matching(config: Config, extractor: Extractor, target: Any, options: dict[str, Any]) -> Objective:
    assert isinstance(target, Moments)
    if extractor.tokens:
        raise InputError(
            "method",
            f"gfmn matches variances at every place of a map, and {extractor.name} has tokens; use another method "
            "with --pool mean, such as mmd",
        )
    correction = config.gfmn.correction
    if target.count <= correction:
        raise InputError("data", f"{target.count} usable image has no variance; give at least 2, or --correction 0")
    if config.gfmn.feature_scale == "target-deviation" and "weights" not in options:
        options = {**options, "weights": feature_weights(target, correction)}
    return MomentMatching(extractor, target, make_averager(config), correction=correction, **options)


def _mmd(config: Config, real: Tensor) -> Discrepancy:
    settings = config.mmd
    factory = kernels.KERNELS[settings.mmd_kernel]
    if settings.mmd_kernel == "polynomial":
        kernel = factory(settings.mmd_degree)
    else:
        kernel = factory(settings.bandwidths) if settings.bandwidths else factory()
    if settings.mmd_landmarks is None:
        return bound_mmd(real, kernel, config.training.batch_size, settings.mmd_unbiased)
    if isinstance(real, FakeTensor):  # a model of a step: there are no numbers to find landmarks in
        points = real[: settings.mmd_landmarks]
        return LandmarkMMD.of_weights(points, points.new_zeros(len(points)), kernel, settings.mmd_unbiased)
    with arguments_as(landmarks="mmd_landmarks", ridge="mmd_landmarks"):
        return LandmarkMMD(real, kernel, settings.mmd_landmarks, settings.mmd_unbiased, seed=config.training.seed)


def _sinkhorn(config: Config, real: Tensor) -> Discrepancy:
    return Sinkhorn(real, config.sinkhorn.sinkhorn_epsilon, config.sinkhorn.sinkhorn_iterations, tolerance=None)


def _drifting(config: Config, real: Tensor) -> Discrepancy:
    return lambda x: drifting(x, real, config.drifting.drifting_temperatures)


def _gmmn(config: Config, real: Tensor) -> Discrepancy:
    """√(MMD² + ε): ε keeps the gradient of the root finite where the two sets are alike."""
    share = real.shape[1] / _GMMN_PIXELS
    distance = MMD(real, kernels.gaussian([math.sqrt(width * share) for width in config.gmmn.gmmn_bandwidths]))
    return lambda x: (distance(x) + _GMMN_FLOOR).sqrt()


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
        scales = options.pop("scales", None)
        if scales is None:
            if bank.count < 2:
                method = config.method.method
                raise InputError("data", f"{bank.count} usable image is too few for --method {method}; give at least 2")
            scales = _unit_scales(config, extractor, bank) if scaled else torch.ones_like(bank.features[0])
        scales = scales.to(extractor.device)
        real = bank.features.to(extractor.device) * scales
        parts = _parts(config, extractor, bank.sizes)
        distances = [bound(config, real[:, part].contiguous() if len(parts) > 1 else real) for part in parts]
        distance = OfNetworks(distances, parts, scales)
        return OnFeatures(extractor, distance, pool=config.features.pool, **options)

    return make


def _unit_scales(config: Config, extractor: Extractor, bank: FeatureBank) -> Tensor:
    scales = bank.scales()
    for part in _parts(config, extractor, bank.sizes):
        unit = kernels.median_distance(bank.features[:, part] * scales[part])
        if not unit > 0:
            raise InputError(
                "method", f"{config.method.method} needs real images that differ, and most of these are the same"
            )
        scales[part] /= unit
    return scales


def _parts(config: Config, extractor: Extractor, sizes: Sequence[int]) -> list[slice]:
    """The pooled features that are compared together: all, or with `--normalise-losses` each network's own."""
    if not config.features.normalise_losses:
        return [slice(0, sum(sizes))]
    features = (sum(sizes[tap] for tap in taps) for taps in extractor.taps_of_networks())
    return [slice(start, end) for start, end in itertools.pairwise(itertools.accumulate(features, initial=0))]


def _frechet(config: Config, extractor: Extractor, known: Any, options: dict[str, Any]) -> Objective:
    """Of all real images: of their covariance, or of what it is made of where that is less."""
    assert isinstance(known, FeatureBank | FeatureCovariance)
    options = dict(options)
    scales = options.pop("scales", None)
    if known.count < 2:
        raise InputError("data", f"{known.count} usable image has no covariance; give at least 2")
    scales = (known.scales() if scales is None else scales).to(extractor.device)
    parts = _parts(config, extractor, known.sizes)
    distances = [_of_population(config, _bound_frechet(known, part, scales[part]), scales[part]) for part in parts]
    distance = OfNetworks(distances, parts, scales)
    return OnFeatures(extractor, distance, pool=config.features.pool, **options)


def _bound_frechet(known: FeatureBank | FeatureCovariance, part: slice, scales: Tensor) -> Frechet:
    if isinstance(known, FeatureBank):
        return Frechet.of(known.features[:, part].to(scales.device) * scales)
    factors = scales.double()
    covariance = known.covariance()[part, part].to(scales.device) * factors * factors[:, None]
    return Frechet(known.mean[part].to(scales.device) * factors, covariance)


def _of_population(config: Config, distance: Frechet, scales: Tensor) -> Discrepancy:
    """The distance of what `--population` says, and not of the minibatch alone."""
    settings, features = config.population, len(scales)
    if settings.population == "queue":
        others = settings.population_images - config.training.batch_size
        return QueuedFeatures(distance, others, features, scales)
    if settings.population == "none":
        return distance
    if features > _MOST_MOVING:
        raise InputError(
            "population",
            f"a moving covariance of {features:,} features takes too long at every step, {_MOST_MOVING:,} is the most; "
            "choose 'queue', or a coarser --pool",
        )
    return MovingCovariance(distance.of_moments, settings.population_decay, features, scales)


_KINDS: dict[str, Callable[[Config], Kind[Any]]] = {
    "gfmn": _moments_kind,
    "mmd": _bank_kind,
    "frechet": _covariance_kind,
    "sinkhorn": _bank_kind,
    "drifting": _bank_kind,
    "gmmn": _bank_kind,
}
_OBJECTIVES: dict[str, Make] = {
    "gfmn": _moment_matching,
    "mmd": _on_bank(_mmd),
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


def reference_kind(config: Config) -> Kind[Any]:
    """What the configured method has to know of the real images."""
    return _KINDS[config.method.method](config)


def blank_reference(
    config: Config, extractor: Extractor, fill: Callable[..., Tensor] = torch.zeros, images: int | None = None
) -> Any:
    """What the configured method would know of `images` real images, of none: `fill(*shape)` in place of numbers.

    For models and traces of a step, which look at shapes alone. By default of as many images as can matter.
    """
    kind = reference_kind(config)
    if isinstance(kind, MomentsKind):
        size = extractor.num_features
        return Moments(2, fill(size, dtype=torch.float64), fill(size, dtype=torch.float64))
    features = sizes(make_pool(config.features.pool), extractor.taps)
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
    make = _OBJECTIVES[config.method.method]
    return make(config, extractor, reference, {**_pass_options(config, dtype), **options})
