"""Whether a network that judges a run is the one by whose features the run learnt."""

from __future__ import annotations

from pathlib import Path

from engine.configuration.autoencoding import needs_perceptual
from engine.configuration.config import Config
from engine.representation.build import one_source_each
from engine.representation.weights import read_state_dict, state_digest
from engine.representation.zoo import brings_weights, is_fixed
from engine.support.files import what_is

_FOR_ALL = (("imagenet",), ("pretrain",), ("random",))
# The same ImageNet weights under two names.
_ALIASES = {"vgg19": "torchvision:vgg19_bn", "timm:tf_efficientnet_lite0": "efficientnet-lite0"}


def same_network(one: str | None, other: str | None) -> bool:
    """Whether two names are of one network; None is Inception-v3."""
    return _called(one) == _called(other)


def _called(name: str | None) -> str | None:
    return None if name is None else _ALIASES.get(name, name)


def was_trained_on(config: Config, name: str | None, weights: str | Path | None) -> bool:
    """Whether a run of `config` learnt by the features of the network `name` with `weights`, as far as can be told.

    Weights that a run pretrained for itself count as those of any file of the same architecture.
    """
    if name is None:
        return False
    if config.needs.features:
        extractor, given = config.networks.extractor, config.networks.weights
    elif needs_perceptual(config):
        extractor, given = config.autoencoder.perceptual, (config.autoencoder.perceptual_weights or "imagenet",)
    else:
        return False
    parts = extractor.split("+")
    sources = given * len(parts) if given in _FOR_ALL else one_source_each(extractor, parts, given)
    for part, source in zip(parts, sources, strict=True):
        if not same_network(part, name):
            continue
        if is_fixed(part) or source == "imagenet" or (source == "pretrain" and brings_weights(part)):
            if weights is None:
                return True
        elif source == "pretrain" or (weights is not None and _same_weights(source, weights)):
            return True
    return False


def _same_weights(trained_on: str | Path | None, weights: str | Path) -> bool:
    if trained_on is None or what_is(trained_on) != "file":
        return False
    return state_digest(read_state_dict(trained_on)) == state_digest(read_state_dict(weights))
