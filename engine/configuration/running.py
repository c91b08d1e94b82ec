"""How a configured run is run: its length, what takes its steps on a device, what judges it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.comparison.reference.statistics_pass import check_same_features, data_fingerprint
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.configuration.groups import ValidationConfig
from engine.configuration.inputs import amp_dtype, neighbours, open_data
from engine.configuration.targets import check_target
from engine.configuration.updates import all_of
from engine.generation.drawn_ahead import CudaLane, DrawnAhead
from engine.generation.priors import Noise
from engine.representation.feature_pass import chosen_backend
from engine.support.errors import InputError
from engine.training.delivery import CudaImageLane, Delivery
from engine.training.graphs import CudaGraphs
from engine.training.ranks import ALONE, Ranks
from engine.training.rates import RateSchedule
from engine.training.schedule import Schedule
from kernels import reference as reference_kernels
from pipelines import ImageDataset, ImageLoader, read_pixels
from pipelines.dataset import ArrayDataset
from pipelines.memory import memory_limit

if TYPE_CHECKING:
    from engine.training.validation import Validation

log = logging.getLogger("gfmn")


def make_schedule(config: Config) -> Schedule:
    """How long the run is, and when it writes what."""
    training, output, updates = config.training, config.output, config.updates
    rates = RateSchedule(
        decay=updates.lr_schedule,
        warmup=updates.warmup_steps,
        final=updates.lr_final / training.lr,
        steps=training.steps,
    )
    return Schedule(
        steps=training.steps,
        batch_size=training.batch_size,
        seed=training.seed,
        generator_ema=all_of(training.generator_ema),
        sample_ema=updates.sample_ema,
        rates=rates,
        max_skipped=updates.max_skipped,
        log_every=output.log_every,
        sample_every=output.sample_every,
        checkpoint_every=output.checkpoint_every,
        evaluate_every=config.validation.evaluate_every,
        keep_checkpoints=output.keep_checkpoints,
        profile=output.profile,
    )


def make_machinery(config: Config, device: torch.device) -> dict[str, Any]:
    """How steps run on `device`, for a method that has been made: the trainer's `noise`, `kernels` and `graphs`.

    InputError if a backend of kernels is asked for that cannot run, or a CUDA graph without the Triton kernels.
    """
    training, asked, dtype = config.training, config.matching.backend, amp_dtype(config) or torch.float32
    if device.type != "cuda":
        if asked not in ("auto", "reference"):
            chosen_backend(asked, device, dtype)  # some methods have no use for it here
        return {"noise": Noise(training.seed, device), "kernels": reference_kernels, "graphs": None}
    backend = chosen_backend(asked, device, dtype)
    captured = training.cuda_graph is not False and backend is not reference_kernels and config.needs.captured
    graphs = CudaGraphs(device) if captured else None
    if training.cuda_graph and graphs is None:
        raise InputError("cuda_graph", "needs the Triton kernels, which cannot run here")
    return {"noise": DrawnAhead(training.seed, CudaLane(device)), "kernels": backend, "graphs": graphs}


def training_images(config: Config, dataset: ImageDataset, device: torch.device, ranks: Ranks = ALONE) -> ImageLoader:
    """This rank's share of the minibatches of real images, in the order that the run's seed decides."""
    backend = config.data.loader
    if backend == "auto" and device.type == "cpu" and isinstance(dataset, ArrayDataset):
        backend = "torch"  # the same images as DALI's, and sooner
    return ImageLoader(
        dataset,
        config.training.batch_size,
        device=device,
        backend=backend,
        shuffle=True,
        seed=config.training.seed,
        part=ranks.rank,
        num_parts=ranks.size,
        drop_last=True,
    )


def check_images(
    config: Config,
    dataset: ImageDataset,
    device: torch.device,
    was: Mapping[str, str] | None,
    run: Path,
    ranks: Ranks = ALONE,
    features: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The fingerprint of the real images, for a run that has no reference whose fingerprint would tell of them; and of
    what compares them.

    InputError if it is another one on another rank, or differs from that of the run in the folder `run`.

    Args:
        was: the fingerprint in that run's checkpoint; None for a new run.
        features: what decides those that images are compared by (see `perceptual_fingerprint`).
    """
    images = training_images(config, dataset, device, ranks)
    entries = ranks.first("images", lambda: data_fingerprint(images))  # others find the digests that rank 0 made
    check_same_features(entries, ranks, "images")
    if features:
        check_same_features(dict(features), ranks, "perceptual features")
        entries |= features
    check_target(config, entries, was or {}, run, device, resumed=True)
    return entries


def make_delivery(
    config: Config, dataset: ImageDataset, device: torch.device, ranks: Ranks = ALONE, *, slots: bool = False
) -> Delivery:
    """The real minibatches of a method that reads images: the trainer's `images`.

    InputError if there are fewer than a minibatch.

    Args:
        slots: see `Delivery`.
    """
    lane = CudaImageLane(device) if device.type == "cuda" else None
    return Delivery(training_images(config, dataset, device, ranks), lane, slots=slots)


def _check_different(asked: ValidationConfig) -> None:
    """InputError if two of the judges are one network."""
    from engine.configuration.provenance import same_network

    for (name, file), (other, others_file) in itertools.combinations(asked.judges, 2):
        if same_network(name, other) and file == others_file:
            raise InputError(asked.named_in, f"{name} and {other} are two names of one network; give one of them")


def make_validation(
    config: Config, device: torch.device, ranks: Ranks = ALONE, *, started: bool = False
) -> Validation | None:
    """Evaluation during training: against all images of the run's data set, none of them mirrored; None for none.

    The ranks share the images; all of them have to come. Warns of a network by whose features the run learns.
    InputError if one is unavailable, or there twice under two names; or, unless the run was `started` before, if the
    real images would not fit.
    """
    asked = config.validation
    if asked.evaluate_every is None:
        return None
    # torch-fidelity takes a second to import.
    from engine.configuration.provenance import was_trained_on
    from engine.evaluation.judges import EvaluationNetwork, evaluation_network
    from engine.training.validation import Validation

    def networks() -> list[EvaluationNetwork]:
        size = config.data.image_size
        return [evaluation_network(name, weights=file, image_size=size) for name, file in asked.judges]

    _check_different(asked)
    with arguments_as(name=asked.named_in, feature_extractor=asked.named_in, weights="evaluate_weights"):
        judges = ranks.first("judge", networks)  # which downloads them
    matched = [was_trained_on(config, name, file) for name, file in asked.judges]
    for judge, is_matched in zip(judges, matched, strict=True):
        if ranks.rank == 0 and is_matched:
            log.warning(
                "warning: --%s: training compares by %s; to that network the samples look better than they are",
                asked.named_in.replace("_", "-"),
                judge.label,
            )
    dataset = open_data(config.replaced({"horizontal_flip": False}))
    here = neighbours(ranks.size) / ranks.size  # of processes, so of pixels
    size = len(dataset) * (3 * dataset.image_size**2 * here + 4 * sum(judge.num_features for judge in judges))
    if size > memory_limit() / 2:
        problem = f"the {len(dataset)} real images and their features take {size / 2**30:.1f} GiB, more than half of "
        problem += "the memory"
        if not started:
            advice = "leave it out, and judge by engine.evaluate, whose --real-samples takes fewer"
            raise InputError("evaluate_every", f"{problem}; {advice}")
        log.warning("warning: --evaluate-every: %s", problem)
    return Validation(
        judges,
        read_pixels(dataset, backend=config.data.loader, shard=ranks.rank, num_shards=ranks.size),
        matched=matched,
        every=asked.evaluate_every,
        samples=asked.evaluate_samples,
        adapt_lr=asked.lr_adapt == "kid",
        device=device,
        ranks=ranks,
    )
