"""From a configuration to what is compared: the reference's kind, and the objective of generated images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.comparison.averagers import AMA, AVERAGERS, Averager, MovingAverage
from engine.comparison.distances import MMD, kernels
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching, feature_weights
from engine.comparison.on_features import OnFeatures
from engine.comparison.reference.bank import BankKind, FeatureBank
from engine.comparison.reference.protocols import Kind
from engine.comparison.reference.target import MomentsKind
from engine.configuration.config import Config
from engine.representation.extractor import Extractor
from engine.representation.protocols import Objective
from engine.support.errors import InputError


def make_averager(config: Config) -> Averager:
    """The configured averager, before its first step."""
    gfmn = config.gfmn
    if gfmn.averager == "ama":
        return AMA(lr=gfmn.ama_lr, variant=gfmn.ama_variant, seed=config.training.seed)
    if gfmn.averager == "ma":
        return MovingAverage(alpha=gfmn.ma_alpha, variant=gfmn.ma_variant)
    return AVERAGERS[gfmn.averager]()


def _moments_kind(config: Config) -> Kind[Any]:
    return MomentsKind()


def _bank_kind(config: Config) -> Kind[Any]:
    return BankKind(config.mmd.pool, config.mmd.mmd_images)


def _pass_options(config: Config, dtype: torch.dtype | None) -> dict[str, Any]:
    """What every objective takes of the settings on how features are computed."""
    matching = config.matching
    return {
        "chunk_size": matching.images_per_chunk,
        "kernels": matching.backend,
        "recompute": matching.recompute,
        "amp_dtype": dtype,
    }


def _moment_matching(config: Config, extractor: Extractor, target: Any, options: dict[str, Any]) -> Objective:
    assert isinstance(target, Moments)
    correction = config.gfmn.correction
    if target.count <= correction:
        raise InputError("data", f"{target.count} usable image has no variance; give at least 2, or --correction 0")
    if config.gfmn.feature_scale == "target-deviation" and "weights" not in options:
        options = {**options, "weights": feature_weights(target, correction)}
    return MomentMatching(extractor, target, make_averager(config), correction=correction, **options)


def _mmd(config: Config, extractor: Extractor, bank: Any, options: dict[str, Any]) -> Objective:
    assert isinstance(bank, FeatureBank)
    settings, options = config.mmd, dict(options)
    # The unit of the bandwidths is the median distance between real images.
    scales = options.pop("scales", None)
    if scales is None:
        if bank.count < 2:
            raise InputError("data", f"{bank.count} usable image is too few for --method mmd; give at least 2")
        scales = bank.scales()
        unit = kernels.median_distance(bank.features * scales)
        if not unit > 0:
            raise InputError("method", "mmd needs real images that differ, and most of these are the same")
        scales = scales / unit
    scales = scales.to(extractor.device)
    real = bank.features.to(extractor.device) * scales
    factory = kernels.KERNELS[settings.mmd_kernel]
    if settings.mmd_kernel == "polynomial":
        kernel = factory(settings.mmd_degree)
    else:
        kernel = factory(settings.bandwidths) if settings.bandwidths else factory()
    distance = MMD(real, kernel, unbiased=settings.mmd_unbiased)
    return OnFeatures(extractor, lambda features: distance(features * scales), pool=settings.pool, **options)


_KINDS: dict[str, Callable[[Config], Kind[Any]]] = {"gfmn": _moments_kind, "mmd": _bank_kind}
_OBJECTIVES: dict[str, Callable[[Config, Extractor, Any, dict[str, Any]], Objective]] = {
    "gfmn": _moment_matching,
    "mmd": _mmd,
}


def reference_kind(config: Config) -> Kind[Any]:
    """What the configured method has to know of the real images."""
    return _KINDS[config.method.method](config)


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
