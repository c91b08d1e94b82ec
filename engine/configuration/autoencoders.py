"""From a configuration to an autoencoding method: the encoder, what compares images, and where codes go."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from engine.comparison.image_losses import ImageErrors, PerceptualErrors, pixel_errors, pyramid_errors
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.configuration.inputs import amp_dtype, known_weights
from engine.generation.learnt import MappingNetwork
from engine.generation.networks import Generator
from engine.generation.priors import make_prior
from engine.methods.autoencoding import Autoencoding, CodeMatching
from engine.representation.build import build_extractor
from engine.representation.encoders import CodeCritic, Encoder, build_encoder
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.zoo import brings_weights, has_imagenet_weights, is_fixed
from engine.support.errors import InputError
from engine.training.ranks import ALONE, Ranks
from kernels import reference

PERCEPTUAL = "perceptual"
"""Among a method's networks, the name of a frozen one whose features compare images."""


def make_perceptual(config: Config, name: str, weights: str | None) -> Extractor:
    """The frozen network `name`, or several joined by +, whose features compare images, in the dtype of its arithmetic,
    on the CPU."""
    parts = name.split("+")
    if weights is None and all(map(brings_weights, parts)):
        weights = "imagenet"
    # The flag takes one file.
    needed = sum(not is_fixed(part) for part in parts)
    stands_for_all = weights == "random" or (weights == "imagenet" and all(map(has_imagenet_weights, parts)))
    if needed > 1 and not stands_for_all:
        line = f"takes one file, and {name} needs {needed}; give {known_weights(name)}, or one network to --perceptual"
        raise InputError("perceptual_weights", line)
    if weights is None:
        known = known_weights(name, "a file from python -m engine.pretrain")
        raise InputError("perceptual_weights", f"{name} brings none; give {known}")
    with arguments_as(name="perceptual", weights="perceptual_weights", image_size="perceptual"):
        source = None if weights == "random" else weights
        extractor = build_extractor(name, image_size=config.data.image_size, weights=source)
    return extractor.to(amp_dtype(config) or torch.float32)


def perceptual_fingerprint(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """What decides the features of the frozen network among the method's; empty if there is none."""
    if PERCEPTUAL not in networks:
        return {}
    extractor = networks[PERCEPTUAL]
    assert isinstance(extractor, Extractor)
    return {"perceptual_weights": extractor.fingerprint["extractor_weights"]}


def perceptual_pass(config: Config, networks: Mapping[str, nn.Module]) -> FeaturePass:
    """The pass over the features of the frozen network among the method's."""
    extractor = networks[PERCEPTUAL]
    assert isinstance(extractor, Extractor)
    # Gradients of each image's own go through no fused kernel.
    chunk = config.autoencoder.perceptual_chunk
    return FeaturePass(extractor, dtype=amp_dtype(config), chunk_size=chunk, kernels=reference)


def make_errors(config: Config, kind: str, networks: Mapping[str, nn.Module]) -> ImageErrors:
    """What `--reconstruction` asks for; the network of "perceptual" is among the method's."""
    if kind == "perceptual":
        return PerceptualErrors(perceptual_pass(config, networks))
    return pyramid_errors if kind == "pyramid" else pixel_errors


def make_autoencoders(config: Config) -> dict[str, nn.Module]:
    """The configured "encoder", and what else the method needs, initialised from torch's random state, on the CPU."""
    own, method, nz = config.autoencoder, config.method.method, config.networks.nz
    networks: dict[str, nn.Module] = {
        "encoder": build_encoder(
            own.encoder or config.networks.generator,
            image_size=config.data.image_size,
            nz=nz,
            gaussian=method == "vae",
            bounded=method in ("ae", "gmmn-ae"),
        )
    }
    if method == "wae" and own.divergence == "gan":
        networks["code_critic"] = CodeCritic(nz)
    if method == "gmmn-ae":
        networks["mapping"] = MappingNetwork((own.code_noise, own.code_width, own.code_width, nz))
    if own.reconstruction == "perceptual":
        networks[PERCEPTUAL] = make_perceptual(config, own.perceptual, own.perceptual_weights)
    return networks


def make_autoencoding(
    config: Config, generator: Generator, networks: Mapping[str, nn.Module], ranks: Ranks = ALONE
) -> Autoencoding | CodeMatching:
    """The configured autoencoding method.

    Args:
        generator, networks: on their device; see `make_autoencoders`.
        ranks: the processes that share every minibatch.
    """
    own, settings, training, updates = config.autoencoder, config.networks, config.training, config.updates
    method, betas = config.method.method, (training.beta1, training.beta2)
    encoder, critic = networks["encoder"], networks.get("code_critic")
    assert isinstance(encoder, Encoder)
    assert critic is None or isinstance(critic, CodeCritic)
    autoencoding = Autoencoding(
        generator,
        encoder,
        make_prior("gaussian" if method in ("ae", "gmmn-ae") else settings.prior, settings.nz),
        {"vae": "kl", "wae": own.divergence}.get(method, "none"),
        weight=own.code_weight,
        reconstruction=make_errors(config, own.reconstruction, networks),
        code_critic=critic,
        batch_size=training.batch_size,
        lr=training.lr,
        betas=betas,
        optimizer=updates.optimizer,
        weight_decay=updates.weight_decay,
        clip_grad=updates.clip_grad,
        critic_lr=own.code_critic_lr,
        amp_dtype=amp_dtype(config),
        recompute_generator=training.recompute_generator,
        batch_statistics=settings.sample_bn == "batch",
        ranks=ranks,
        global_batches=settings.generator_bn == "global",
    )
    if method != "gmmn-ae":
        return autoencoding
    mapping = networks["mapping"]
    assert isinstance(mapping, MappingNetwork)
    return CodeMatching(
        autoencoding,
        mapping,
        make_prior(settings.prior, own.code_noise),
        autoencoder_steps=own.autoencoder_steps,
        bandwidths=own.code_bandwidths,
        lr=training.lr if own.mapping_lr is None else own.mapping_lr,
        betas=betas,
        optimizer=updates.optimizer,
        weight_decay=updates.weight_decay,
    )
