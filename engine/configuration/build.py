"""From a configuration to the parts of a run: device, dataset, extractor, reference, method, validation."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.comparison.reference.cache import cached_reference, exclusive, handed_out
from engine.comparison.reference.protocols import Kind, Reference
from engine.comparison.reference.statistics_pass import check_same_features, fingerprint, reference_loader
from engine.configuration.autoencoders import make_autoencoders, make_autoencoding
from engine.configuration.command import arguments_as, without_pretraining
from engine.configuration.config import Config
from engine.configuration.critics import make_adversarial, make_critics, real_labels
from engine.configuration.inputs import amp_dtype, known_weights
from engine.configuration.latents import make_latent, make_latents
from engine.configuration.methods import ADVERSARIAL, AUTOENCODING, LATENT, WITH_TABLE
from engine.configuration.objectives import check_features, make_objective, reference_kind
from engine.configuration.targets import check_target
from engine.generation.networks import Generator, build_generator
from engine.generation.priors import make_prior
from engine.methods.code_starts import principal_codes
from engine.methods.matching import Matching
from engine.methods.protocols import Method
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor, feature_fingerprint
from engine.representation.pretraining import UnfitCheckpoint, pretrain
from engine.representation.weights import read_state_dict
from engine.representation.zoo import brings_weights, is_fixed
from engine.support.errors import InputError, Interrupted, WriteError
from engine.training.ranks import ALONE, Ranks
from pipelines import ImageDataset, ImageLoader, cache_is_kept, cached, temporary_folder
from pipelines.dataset import ArrayDataset

log = logging.getLogger("gfmn")

_TINTED_EPOCHS = 12
_FIRST_CODES = 256
"""Images that are read at a time for their first codes."""

Networks = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Recipe:
    """How a method that compares no features is made.

    Attributes:
        networks: what it needs besides the generator, by name, on the CPU and initialised from torch's random state
            (the seed's, and the same on every rank). But for codes of the images nothing else of the method may have
            weights: whoever models a step puts networks without memory in their place.
        method: from the settings, the generator, these networks, all on their device, the ranks, and by name what it
            takes of `make_method`'s options.
    """

    networks: Callable[[Config], Networks]
    method: Callable[..., Method]


RECIPES: dict[str, Recipe] = {
    **{name: Recipe(make_critics, make_adversarial) for name in ADVERSARIAL},
    **{name: Recipe(make_autoencoders, make_autoencoding) for name in AUTOENCODING},
    **{name: Recipe(make_latents, make_latent) for name in LATENT},
}
"""Of every method that compares no features (`Needs.features`)."""


def make_extractor(
    config: Config,
    dataset: ImageDataset,
    device: torch.device,
    pretrained: Mapping[str, Path] | None = None,
    ranks: Ranks = ALONE,
) -> Extractor:
    """The frozen extractor on its device, pretrained on the dataset first if its weights say so.

    Args:
        pretrained: what `pretrained_files` gave, where it was asked before.
        ranks: see `pretrained_files`.
    """
    networks = config.networks
    weights: list[Path | str] | list[str] | str | None
    if not networks.weights and not all(map(is_fixed, networks.extractor.split("+"))):
        known = known_weights(networks.extractor, "files from python -m engine.pretrain", "'pretrain'")
        raise InputError("weights", f"the preset {config.preset} needs weights for {networks.extractor}: {known}")
    if networks.weights == ("random",):
        torch.manual_seed(config.training.seed)
        weights = None
    elif networks.weights == ("pretrain",):
        files = pretrained_files(config, dataset, device, ranks=ranks) if pretrained is None else pretrained
        weights = [files.get(name, "imagenet") for name in networks.extractor.split("+")]
    else:
        weights = networks.weights[0] if networks.weights == ("imagenet",) else list(networks.weights)
    return bare_extractor(config, weights).to(device)


def bare_extractor(config: Config, weights: Any = None) -> Extractor:
    """The configured extractor with these weights, on the CPU."""
    networks = config.networks
    with arguments_as(name="extractor", bn="extractor_bn"):
        return build_extractor(
            networks.extractor,
            image_size=config.data.image_size,
            weights=weights,
            layers=networks.layers,
            layers_from=networks.layers_from,
            taps=networks.taps,
            bn=networks.extractor_bn,
        )


def pretrained_files(
    config: Config, dataset: ImageDataset, device: torch.device, kept: Path | None = None, ranks: Ranks = ALONE
) -> dict[str, Path]:
    """Weights of the networks that are pretrained on the dataset, by architecture: from `kept`, from the cache, or
    made now and cached. Empty if the configuration says otherwise.

    Args:
        kept: where a run keeps its own (`RunFolder.extractor`).
        ranks: the job, whose end another process's work is not waited for any longer.
    """
    if config.networks.weights != ("pretrain",):
        return {}
    names = [name for name in config.networks.extractor.split("+") if not brings_weights(name)]
    if names:  # what the method cannot compare is better refused now than after minutes
        with torch.random.fork_rng(devices=[]):
            check_features(config, bare_extractor(config), len(dataset))
    return {name: _pretrained(name, config, dataset, device, kept, ranks) for name in names}


def _pretrained(
    architecture: str, config: Config, dataset: ImageDataset, device: torch.device, kept: Path | None, ranks: Ranks
) -> Path:
    if kept is not None and _is_readable(own := kept / f"{architecture}.safetensors"):
        return own
    task = "classify" if dataset.num_classes >= 2 else "rotate"
    if task == "classify" and isinstance(dataset, ArrayDataset) and dataset.is_grey():
        task = "tinted"
    seed, loader = config.training.seed, config.data.loader
    decoded = dataset if isinstance(dataset, ArrayDataset) else ImageLoader(dataset, 1, device=device, backend=loader)
    recipe = {**decoded.fingerprint(), "architecture": architecture, "task": task, "seed": seed, "recipe": 1}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:24]
    path = cached("extractors", f"{architecture}-{digest}.safetensors")
    if not _is_readable(path):
        with exclusive(path, ranks):
            if not _is_readable(path):
                return _pretrain_into(path, architecture, dataset, task, seed, device, loader)
    if ranks.rank == 0:
        log.info("extractor %s: pretrained before, cached in %s", architecture, path)
    return path


def _is_readable(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        return bool(read_state_dict(path))
    except InputError as error:
        log.warning("warning: %s; it is not used", error)
        return False


def _pretrain_into(
    path: Path, architecture: str, dataset: ImageDataset, task: str, seed: int, device: torch.device, loader: str
) -> Path:
    """Pretrain, and return where the weights are: at `path`, unless there is no room."""
    log.info("extractor %s: pretraining on %s (%s)", architecture, dataset.name, task)
    begun, partial = time.perf_counter(), path.with_suffix(".partial")
    checkpoint = partial if cache_is_kept() else None
    epochs: dict[str, Any] = {"epochs": _TINTED_EPOCHS} if task == "tinted" else {}
    run = functools.partial(
        pretrain,
        architecture,
        dataset,
        task=task,
        seed=seed,
        device=str(device),
        loader=loader,
        checkpoint=checkpoint,
        resume=True,
        **epochs,
    )
    try:
        with without_pretraining(architecture), arguments_as(architecture="extractor"):
            try:
                result = run()
            except UnfitCheckpoint as error:
                log.info("%s: begins anew (%s)", partial, error)
                partial.unlink()
                result = run()
    except Interrupted as interruption:
        again = "" if checkpoint is None else "; the same command continues from there"
        raise Interrupted(f"pretraining was {interruption}{again}", interruption.status) from None
    try:
        result.save(path)
    except WriteError as error:
        log.warning("warning: %s; this extractor is not kept for other runs", error)
        path = temporary_folder() / path.name
        result.save(path)
    partial.unlink(missing_ok=True)
    seconds = time.perf_counter() - begun
    log.info(
        "extractor %s: %s %.3f on held-out images, %.0f s", architecture, result.metric, result.validation, seconds
    )
    return path


def make_generator(config: Config) -> Generator:
    """The configured generator, initialised from torch's random state, on the CPU."""
    networks = config.networks
    size, nz = config.data.image_size, networks.nz
    return build_generator(networks.generator, image_size=size, nz=nz, upsampling=networks.upsampling)


def make_networks(config: Config, *, started: bool = False) -> Networks:
    """What the configured method trains besides the generator, by name, initialised from torch's random state, on the
    CPU; nothing for one that compares features.

    Args:
        started: whether a checkpoint has their weights, so that the file which a critic starts from is not read.
    """
    if started and config.method.method in ADVERSARIAL and config.critic.start_file is not None:
        config = config.replaced({"critic_weights": None})
    return {} if config.needs.features else RECIPES[config.method.method].networks(config)


def of_images(
    config: Config,
    dataset: ImageDataset,
    ranks: Ranks = ALONE,
    *,
    device: torch.device | None = None,
    started: bool = False,
) -> dict[str, Any]:
    """What the configured method takes of the data set besides its images, as options of `make_method`.

    Args:
        ranks, device: those that the method is made for.
        started: whether a checkpoint has what the method learnt since, so that no pass over the images is needed.
    """
    if config.method.method in WITH_TABLE:
        start = None
        if config.latent.code_start == "pca" and not started:
            start = ranks.first("codes", lambda: _first_codes(config, dataset, ranks)).to(device or "cpu")
            ranks.sum_([start])  # all have rank 0's; begun together, as collectives are waited for 10 minutes at most
        return {"images": len(dataset), "start": start}
    labels = real_labels(config, dataset)
    return {} if labels is None else {"labels": labels}


def _first_codes(config: Config, dataset: ImageDataset, ranks: Ranks) -> Tensor:
    """The principal components of the images [M, nz] on rank 0, zeros on the others."""
    nz = config.networks.nz
    if ranks.rank:
        return torch.zeros(len(dataset), nz)
    images = ImageLoader(dataset, _FIRST_CODES, backend=config.data.loader, seed=config.training.seed)
    return principal_codes(images, len(dataset), nz, radius=config.latent.code_radius)


def pass_batch_size(config: Config) -> int:
    """Images at a time in the statistics pass, on whose result it has no influence with running statistics.

    Twice the minibatch, or twice the chunk: without gradients that needs less memory than a training step.
    """
    chunk, batch = config.matching.chunk_size, config.training.batch_size
    if config.networks.extractor_bn == "batch":
        return batch
    return 2 * (chunk if isinstance(chunk, int) else batch)


def make_reference(
    config: Config,
    extractor: Extractor,
    dataset: ImageDataset,
    dtype: torch.dtype | None,
    kept: Path | None = None,
    was: Mapping[str, str] | None = None,
    ranks: Ranks = ALONE,
) -> Reference:
    """What the method knows of the real images: what the run kept, a given file, or computed once and cached.

    Args:
        kept: where a run that is resumed keeps it (`RunFolder.target`). Who decoded its images decides nothing any
            more, everything else must be as it was.
        was: the fingerprint in that run's checkpoint, compared before anything is computed.
        ranks: the processes that share the pass. All get what rank 0 found or made, bit for bit.
    """
    kind = reference_kind(config, extractor)
    # A reference from a file or the cache is rank 0's alone, and two machines may have pretrained two networks.
    check_same_features(feature_fingerprint(extractor, dtype), ranks)
    known = _known_reference(config, kind, extractor, dataset, dtype, kept, was) if ranks.rank == 0 else None
    if any(ranks.meet("known", known is not None)):
        return handed_out(kind, known, ranks)
    with reference_arguments():
        return cached_reference(
            kind,
            extractor,
            pass_images(config, extractor, dataset, ranks),
            amp_dtype=dtype,
            kernels=config.matching.backend,
            ranks=ranks,
        )


def reference_arguments() -> AbstractContextManager[None]:
    """Inside a reference is computed: its arguments by the names of their settings (see `arguments_as`)."""
    return arguments_as(landmarks="mmd_landmarks", ridge="mmd_landmarks")


def pass_images(config: Config, extractor: Extractor, dataset: ImageDataset, ranks: Ranks = ALONE) -> ImageLoader:
    """This rank's share of the images of the statistics pass."""
    return reference_loader(
        extractor,
        dataset,
        batch_size=pass_batch_size(config),
        seed=config.training.seed,
        loader=config.data.loader,
        shard=ranks.rank,
        num_shards=ranks.size,
    )


def _known_reference(
    config: Config,
    kind: Kind[Any],
    extractor: Extractor,
    dataset: ImageDataset,
    dtype: torch.dtype | None,
    kept: Path | None,
    was: Mapping[str, str] | None,
) -> Reference | None:
    """What the run kept, or the given file; None if there is neither. InputError if it doesn't fit."""
    expected = fingerprint(kind, extractor, pass_images(config, extractor, dataset), dtype)
    if kept is not None and kept.exists():
        try:
            found = kind.load(kept)
        except InputError as error:
            log.warning("warning: %s; it is computed again", error)
        else:
            same = {name: value for name, value in expected.items() if name != "data_decoder"}
            check_target(config, same, found.fingerprint or {}, kept.parent, extractor.device, resumed=True)
            return found
    check_target(config, expected, was or {}, "target" if kept is None else kept.parent, extractor.device, resumed=True)
    if (given := config.matching.target) is not None:
        found = kind.load(given)
        check_target(config, expected, found.fingerprint or {}, Path(given), extractor.device)
        return found
    return None


def make_method(
    config: Config,
    generator: Generator,
    extractor: Extractor | None = None,
    reference: Any = None,
    ranks: Ranks = ALONE,
    *,
    networks: Networks | None = None,
    **options: Any,
) -> Method:
    """The configured method; its networks are on their device.

    Args:
        extractor, reference: of a method that compares features.
        networks: of one that compares none, from `make_networks`.
        ranks: the processes that share every minibatch.
        options: take the place of what the configuration says for the objective's arguments of these names. Of a method
            that compares no features: what it needs of the real images besides (`of_images`).
    """
    if extractor is None:
        return RECIPES[config.method.method].method(config, generator, networks or {}, ranks, **options)
    dtype, training, settings = amp_dtype(config), config.training, config.networks
    objective = make_objective(config, extractor, reference, dtype, **{"ranks": ranks, **options})
    return Matching(
        generator,
        make_prior(settings.prior, settings.nz),
        objective,
        batch_size=training.batch_size,
        lr=training.lr,
        betas=(training.beta1, training.beta2),
        optimizer=config.updates.optimizer,
        weight_decay=config.updates.weight_decay,
        clip_grad=config.updates.clip_grad,
        amp_dtype=dtype,
        recompute_generator=training.recompute_generator,
        batch_statistics=settings.sample_bn == "batch",
        ranks=ranks,
        global_batches=settings.generator_bn == "global",
    )
