"""From a configuration to a method with codes and no encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from engine.configuration.autoencoders import PERCEPTUAL, make_errors, make_perceptual, perceptual_pass
from engine.configuration.autoencoding import needs_perceptual
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.configuration.inputs import amp_dtype
from engine.generation.learnt import MappingNetwork
from engine.generation.networks import Generator
from engine.generation.priors import make_prior
from engine.methods.latent import CodeTable, Glann, Glo, Imle
from engine.methods.pools import FeatureRows, Rows, pixel_rows, pyramid_rows
from engine.training.ranks import ALONE, Ranks

_ROWS: dict[str, Rows] = {"pixels": pixel_rows, "pyramid": pyramid_rows}


def make_latents(config: Config) -> dict[str, nn.Module]:
    """What the method needs besides generator and codes, initialised from torch's random state, on the CPU."""
    own, networks = config.autoencoder, dict[str, nn.Module]()
    if config.method.method == "glann":
        networks["mapping"] = MappingNetwork((own.code_noise, own.code_width, own.code_width, config.networks.nz))
    if needs_perceptual(config):
        networks[PERCEPTUAL] = make_perceptual(config, own.perceptual, own.perceptual_weights)
    return networks


def make_latent(
    config: Config,
    generator: Generator,
    networks: Mapping[str, nn.Module],
    ranks: Ranks = ALONE,
    images: int | None = None,
    start: Tensor | None = None,
) -> Glo | Imle | Glann:
    """The configured method.

    Args:
        generator, networks: on their device; see `make_latents`.
        ranks: the processes that share every minibatch.
        images: how many real ones there are; None for a minibatch's.
        start: codes [images, nz] that the table begins with, on the generator's device; None for random ones.
    """
    own, codes, settings = config.latent, config.autoencoder, config.networks
    training, updates, method = config.training, config.updates, config.method.method
    options: dict[str, Any] = {
        "reconstruction": make_errors(config, codes.reconstruction, networks),
        "batch_size": training.batch_size,
        "lr": training.lr,
        "betas": (training.beta1, training.beta2),
        "optimizer": updates.optimizer,
        "weight_decay": updates.weight_decay,
        "clip_grad": updates.clip_grad,
        "amp_dtype": amp_dtype(config),
        "recompute_generator": training.recompute_generator,
        "batch_statistics": settings.sample_bn == "batch",
        "ranks": ranks,
        "global_batches": settings.generator_bn == "global",
    }
    if method == "imle":
        return Imle(
            generator,
            make_prior(settings.prior, settings.nz),
            pool=own.pool_size,
            pool_every=own.pool_every,
            kernels=config.matching.backend,
            rows=FeatureRows(perceptual_pass(config, networks)) if own.search == "features" else _ROWS[own.search],
            **options,
        )
    device = next(generator.parameters()).device
    with arguments_as(radius="code_radius"):
        count = images or training.batch_size
        table = CodeTable(count, settings.nz, radius=own.code_radius, seed=training.seed, start=start, device=device)
    glo = Glo(generator, table, images=images, code_lr=own.code_lr, **options)
    if method == "glo":
        return glo
    mapping = networks["mapping"]
    assert isinstance(mapping, MappingNetwork)
    return Glann(
        glo,
        mapping,
        make_prior(settings.prior, codes.code_noise),
        glo_steps=own.glo_steps,
        pool=own.pool_size,
        pool_every=own.pool_every,
        kernels=config.matching.backend,
        batch_size=training.batch_size,
        lr=training.lr if codes.mapping_lr is None else codes.mapping_lr,
        betas=(training.beta1, training.beta2),
    )
