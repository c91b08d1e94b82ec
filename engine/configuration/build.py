"""From a configuration to the parts of a run: device, dataset, extractor, target, objective."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path

import torch

from engine.comparison.averagers import AMA, Averager, MovingAverage, NoAverage
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.reference.statistics_pass import cached_target, fingerprint, target_loader
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.configuration.data import open_data as open_data
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.pretraining import pretrain
from engine.representation.zoo import brings_weights
from engine.support.errors import InputError
from pipelines import ImageDataset, cache_folder

log = logging.getLogger("gfmn")


def make_extractor(config: Config, dataset: ImageDataset, device: torch.device) -> Extractor:
    """The frozen extractor on its device, pretrained on the dataset first if its weights say so."""
    networks = config.networks
    weights: list[Path | str] | list[str] | str | None
    if not networks.weights:
        raise InputError(
            f"--weights: the preset {config.preset} needs weights for {networks.extractor}: files from python -m "
            "engine.pretrain, 'imagenet', 'pretrain', or 'random' if you mean it"
        )
    if networks.weights == ("random",):
        torch.manual_seed(config.training.seed)
        weights = None
    elif networks.weights == ("pretrain",):
        weights = [
            "imagenet" if brings_weights(name) else _pretrained(name, dataset, device, config.training.seed)
            for name in networks.extractor.split("+")
        ]
    else:
        weights = networks.weights[0] if networks.weights == ("imagenet",) else list(networks.weights)
    with arguments_as(name="extractor", bn="extractor_bn"):
        extractor = build_extractor(
            networks.extractor,
            image_size=config.data.image_size,
            weights=weights,
            layers=networks.layers,
            layers_from=networks.layers_from,
            taps=networks.taps,
            bn=networks.extractor_bn,
        )
    return extractor.to(device)


def _pretrained(architecture: str, dataset: ImageDataset, device: torch.device, seed: int) -> Path:
    """Weights of `architecture` trained on `dataset`, from the cache if it was done before."""
    task = "classify" if dataset.num_classes >= 2 else "rotate"
    recipe = {**dataset.fingerprint(), "architecture": architecture, "task": task, "seed": seed, "recipe": 1}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:24]
    path = cache_folder() / "extractors" / f"{architecture}-{digest}.safetensors"
    if path.exists():
        log.info("extractor %s: pretrained before, cached in %s", architecture, path)
        return path
    log.info("extractor %s: pretraining on %s (%s)", architecture, dataset.name, task)
    begun = time.perf_counter()
    with arguments_as(architecture="extractor"):
        result = pretrain(
            architecture, dataset, task=task, image_size=dataset.image_size, seed=seed, device=str(device)
        )
    result.save(path)
    seconds = time.perf_counter() - begun
    log.info(
        "extractor %s: %s %.3f on held-out images, %.0f s", architecture, result.metric, result.validation, seconds
    )
    return path


def pass_batch_size(config: Config) -> int:
    """Images at a time in the statistics pass, on whose result it has no influence with running statistics.

    Twice the minibatch, or twice the chunk: without gradients that needs less memory than a training step.
    """
    chunk, batch = config.matching.chunk_size, config.training.batch_size
    if config.networks.extractor_bn == "batch":
        return batch
    return 2 * (chunk if isinstance(chunk, int) else batch)


def make_target(config: Config, extractor: Extractor, dataset: ImageDataset, dtype: torch.dtype | None) -> Moments:
    """The target: the file of `--target`, or computed once and cached."""
    batch_size, seed, loader = pass_batch_size(config), config.training.seed, config.data.loader
    if config.output.target is not None:
        images = target_loader(extractor, dataset, batch_size=batch_size, seed=seed, loader=loader)
        return Moments.load(config.output.target, fingerprint(extractor, images, dtype))
    return cached_target(
        extractor,
        dataset,
        amp_dtype=dtype,
        kernels=config.matching.backend,
        batch_size=batch_size,
        seed=seed,
        loader=loader,
    )


def make_averager(config: Config) -> Averager:
    """The configured averager, before its first step."""
    matching = config.matching
    if matching.averager == "ama":
        return AMA(lr=matching.ama_lr, variant=matching.ama_variant, seed=config.training.seed)
    if matching.averager == "ma":
        return MovingAverage(alpha=matching.ma_alpha, variant=matching.ma_variant)
    return NoAverage()


def make_objective(config: Config, extractor: Extractor, target: Moments, dtype: torch.dtype | None) -> MomentMatching:
    """The matching objective of a run."""
    try:
        return MomentMatching(
            extractor,
            target,
            make_averager(config),
            chunk_size=config.matching.images_per_chunk,
            kernels=config.matching.backend,
            correction=config.matching.correction,
            amp_dtype=dtype,
            checkpoint=config.matching.checkpoint,
            feature_scale=config.matching.feature_scale,
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
