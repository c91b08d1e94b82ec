"""Helpers: trainers whose steps take milliseconds, one for every way to train, and their step on the device.

A lint looks at the steps of all `VARIANTS`. What the operators are does not depend on sizes, so images, networks and
minibatches are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from helpers.marks import quick
from helpers.recorded_graphs import RecordedImageLane, RecordedLane
from torch import Tensor

from engine.configuration.build import bare_extractor, make_generator, make_method, make_networks, of_images
from engine.configuration.config import Config
from engine.configuration.groups import GROUPS, field_names, owners
from engine.configuration.methods import ADVERSARIAL, COMPARING, NEEDS
from engine.configuration.objectives import blank_reference
from engine.configuration.presets import PRESETS, preset_method
from engine.configuration.published import PUBLISHED
from engine.configuration.running import make_schedule, training_images
from engine.generation.drawn_ahead import DrawnAhead
from engine.training.checkpoint import Checkpoint
from engine.training.delivery import Delivery
from engine.training.graphs import Graphs
from engine.training.ranks import ALONE, Ranks
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer
from kernels import reference
from pipelines.dataset import ArrayDataset
from pipelines.decoding.preprocessing import Preprocessing

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"amp": True},
    "fp16": {"amp": True, "amp_dtype": "fp16", "batch_size": 2},  # slow on a CPU
}
_AMP: dict[str, Any] = {"amp": True}
_OF_METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "gfmn": {
        "ama-authors": {"ama_variant": "authors"},
        "ama-authors-0.3": {"ama_variant": "authors-0.3"},
        "ma": {"averager": "ma"},
        "ma-authors": {"averager": "ma", "ma_variant": "authors"},
        "ma-authors-smooth": {"averager": "ma", "ma_variant": "authors", "ma_alpha": 0.3},
        "no-averager": {"averager": "none"},
        "correction-0": {"correction": 0},
        "feature-scale": {"feature_scale": "target-deviation"},
        "moving-population": {"population": "ema"},
        "queued-population": {"population": "queue", "population_images": 15},
    },
    "mmd": {
        "normalised": {"extractor": "vgg-small+resnet18", "normalise_losses": True},
        "deviations": {"pool": "mean+std"},
        "pixels": {"extractor": "pixels"},
        "landmarks": {"mmd_landmarks": 4},
        "gaussian": {"mmd_kernel": "gaussian"},
        "imq": {"mmd_kernel": "imq"},
        "rational-quadratic-linear": {"mmd_kernel": "rational-quadratic-linear"},
        "energy": {"mmd_kernel": "energy"},
        "linear": {"mmd_kernel": "linear"},
        "polynomial": {"mmd_kernel": "polynomial"},
        "unbiased": {"mmd_unbiased": True},
        "mean-pool": {"pool": "mean"},
        "no-pool": {"pool": "none"},
    },
    "frechet": {
        "moving-population": {"population": "ema", "pool": "mean"},
        "queued-population": {"population": "queue", "population_images": 15},
    },
}
_OF_ALL: dict[str, dict[str, Any]] = {
    "chunks": {"chunk_size": 2},
    "uneven-chunks": {"chunk_size": 3},
    "stages": {"recompute": "stages"},
    "stages-of-chunks": {"recompute": "stages", "chunk_size": 2},
    "recompute-generator": {"recompute_generator": True},
    "everything-recomputed": {"recompute_generator": True, "recompute": "stages", "chunk_size": 3, **_AMP},
    "weight-average": {"generator_ema": 0.9},
    "weight-averages": {"generator_ema": (0.9, 0.99), "sample_ema": 0.99},
    "adamw": {"optimizer": "adamw", "lr_schedule": "linear"},
    "clipped": {"clip_grad": 0.1, "lr_schedule": "cosine", "warmup_steps": 2, "lr_final": 1e-5},
    "clipped-fp16": {"clip_grad": 0.1, "amp": True, "amp_dtype": "fp16", "batch_size": 2},
    "uniform-prior": {"prior": "uniform"},
    "resnet-generator": {"generator": "resnet"},
    "nearest": {"upsampling": "nearest"},
    "bilinear": {"upsampling": "bilinear"},
    "shortcuts": {"extractor": "resnet18"},
    "two-networks": {"extractor": "vgg-small+resnet18", **_AMP},
    "extractor-bn": {"extractor": "resnet18", "extractor_bn": "batch"},
    "sample-bn": {"sample_bn": "batch"},
    "own-batches": {"generator_bn": "local"},
    **PRECISIONS,
}

_OF_CRITICS: dict[str, dict[str, dict[str, Any]]] = {
    "gan": {
        "minimax": {"game": "minimax", "critic_optimizer": "adam", "optimizer": "rmsprop"},
        "several": {"penalty": ["r1", "consistency"], "critic_steps": 2, "recompute_generator": True},
        "discrimination": {"minibatch_discrimination": True, "critic_optimizer": "adamw"},
        "bf16": {"penalty": ["consistency"], "amp": True, "generator_ema": 0.9},
        "bf16-generator": {"penalty": ["gradient"], "amp": True},
        "fp16": {"amp": True, "amp_dtype": "fp16", "critic_optimizer": "rmsprop", "critic_norm": "batch"},
        "warmup": {"critic_warmup": 2, "critic_many": 2},
        "clipped": {"clip_grad": 0.1, "lr_schedule": "linear"},
    },
    "mmd-gan": {
        "imq": {"kernel": "imq", "penalty": ["scaled"]},
        "linear": {"kernel": "linear", "penalty": ["witness", "activations"]},
        "polynomial": {"kernel": "polynomial", "scaled": True},
        "distance": {"kernel": "distance", "penalty": ["none"], "amp": True},
    },
    "mcgan": {"sum": {"match_norm": "1"}, "largest": {"match_norm": "inf"}},
    "improved-gan": {"classes": {"classes": 3}},
    "dfm": {
        "discrimination": {"minibatch_discrimination": True, "penalty": ["consistency"]},
        "bf16": {"amp": True, "critic_norm": "spectral"},
        "fp16": {"amp": True, "amp_dtype": "fp16", "recompute_generator": True},
    },
    "molm": {
        "spectral": {"critic_norm": "spectral-scaled", "critic": "resnet"},
        "bf16": {"amp": True, "recompute_generator": True},
    },
}
_FEW_OWN: dict[str, dict[str, Any]] = {
    "dfm": {"denoiser_width": 8, "denoiser_layers": 3},
    "molm": {"moment_every": 2, "moment_steps": 2, "moment_images": 4},
}
_OF_AUTOENCODERS: dict[str, dict[str, dict[str, Any]]] = {
    "ae": {
        "pyramid": {"reconstruction": "pyramid", "recompute_generator": True},
        "perceptual": {"reconstruction": "perceptual", "perceptual": "pixels", "amp": True},
    },
    "vae": {"float32": {}, "bf16": {"amp": True, "encoder": "resnet", "generator": "resnet"}},
    "wae": {"mmd": {"prior": "uniform"}, "gan": {"divergence": "gan", "clip_grad": 0.1, "prior": "ball"}},
    "gmmn-ae": {"float32": {}},
}
_OF_LATENT: dict[str, dict[str, dict[str, Any]]] = {
    "glo": {"pixels": {"reconstruction": "pixels", "amp": True}},
    "imle": {
        "pyramid": {"pool_size": 7, "pool_every": 2},
        "pixels": {"pool_size": 7, "search": "pixels", "recompute_generator": True},
        "features": {"pool_size": 7, "search": "features", "perceptual": "pixels", "perceptual_chunk": 2},
    },
    "glann": {"float32": {"pool_size": 9, "glo_steps": 1, "code_start": "pca"}},
}
_FEW_STEPS = {"critic_steps": 1, "critic_warmup": 0, "critic_every": None, "critic": "dcgan", "generator": "dcgan"}


def _of_published(name: str) -> dict[str, Any]:
    """One critic step, and networks that take no time, where the game does not need others."""
    own = {"critic": PUBLISHED[name]["critic"]} if name in ("began", "mmd-gan-rbf") else {}
    method = preset_method(name)
    steps = {key: value for key, value in _FEW_STEPS.items() if method in (owners(key) or (method,))}
    return {**steps, **own, **_FEW_OWN.get(name, {}), "batch_size": 3}


def _of_all(method: str) -> dict[str, dict[str, Any]]:
    """The other methods on features take mmd's steps, but for the distance."""
    if method in ("gfmn", "mmd"):
        return _OF_ALL
    return {name: _OF_ALL[name] for name in ("float32", "bf16", "chunks")}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{preset}-{name}": (preset, given)
        for preset in PRESETS
        if preset not in PUBLISHED
        for name, given in PRECISIONS.items()
    },
    **{f"published-{name}": (name, _of_published(name)) for name in PUBLISHED},
    **{
        f"{method}-{name}": (
            "digits",
            {"method": method, "batch_size": 3, **_FEW_OWN.get(method, {"critic_steps": 1}), **given},
        )
        for method, variants in _OF_CRITICS.items()
        for name, given in variants.items()
    },
    **{
        f"{method}-{name}": ("digits", {"method": method, **given})
        for method, variants in {**_OF_AUTOENCODERS, **_OF_LATENT}.items()
        for name, given in variants.items()
    },
    **{
        f"{method}-{name}": ("digits", {"method": method, **given})
        for method in COMPARING
        for name, given in {**_of_all(method), **_OF_METHODS.get(method, {})}.items()
    },
}
"""Name → preset and settings, of every way to train whose operators or arguments are its own."""
_SLOW = {
    *("ae-perceptual", "vae-bf16", "gmmn-ae-float32", "gfmn-uneven-chunks", "gfmn-stages-of-chunks", "gfmn-nearest"),
    *("gfmn-clipped-fp16", "gfmn-ama-authors", "gfmn-ma-authors-smooth", "gfmn-correction-0", "mmd-mean-pool"),
    *("mmd-gaussian", "mmd-imq", "mmd-linear", "mmd-polynomial"),
}
_ALWAYS = ("gan-minimax", "gan-bf16", "published-wgan-gp", "published-sngan", "published-fisher-gan")


def marked(names: Iterable[str], slow: Callable[[Config], bool] = lambda config: False) -> list[Any]:
    """For `parametrize`: variants, of which those that are much like others are slow tests.

    These are most that have a critic; the presets but the digits'; and what a method has in common with gfmn.

    Args:
        slow: which others take long in this test.
    """

    def is_slow(name: str) -> bool:
        preset, given = VARIANTS[name]
        method = given.get("method", preset_method(preset))
        common = name.removeprefix(f"{method}-") in _OF_ALL.keys() - {"float32"}
        if method in ADVERSARIAL:
            alike = name not in _ALWAYS
        else:
            alike = name in _SLOW or preset != "digits" or (method != "gfmn" and common)
        return alike or slow(configuration(preset, given))

    names = list(names)
    return quick(names, [name for name in names if not is_slow(name)])


def configuration(preset: str, given: dict[str, Any]) -> Config:
    """The preset with `given` settings, small."""
    method = given.get("method", preset_method(preset))
    small: dict[str, Any] = {"image_size": 32, "batch_size": 5, "nz": 8}
    if NEEDS[method].features:
        small |= {"weights": ("random",), "layers": 4}
    images = f"{method}_images"  # real ones, where a method compares with them
    bank = {images: 6} if any(images in field_names(group) for group in GROUPS.values()) else {}
    return Config.build(preset, {**small, **bank, **given})


def few_pictures(config: Config) -> ArrayDataset:
    """Random pictures, three times as many as a minibatch has."""
    size = config.data.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (3 * config.training.batch_size, size, size, 3), np.uint8)
    return ArrayDataset("few", Preprocessing(image_size=size), pictures, labels=np.arange(len(pictures)) % 3)


def small_trainer(config: Config, ranks: Ranks = ALONE, graphs: Graphs | None = None) -> Trainer:
    """A new trainer on the CPU that steps as one on a GPU does, with the plain kernels."""
    torch.manual_seed(3)
    generator = make_generator(config)
    if config.needs.features:
        extractor = bare_extractor(config)
        known = blank_reference(config, extractor, torch.rand)
        method = make_method(config, generator, extractor, known, ranks, kernels=reference)
    else:
        more = of_images(config, few_pictures(config))
        method = make_method(config, generator, ranks=ranks, networks=make_networks(config), **more)
    options: dict[str, Any] = {"noise": DrawnAhead(config.training.seed, RecordedLane()), "kernels": reference}
    if method.reads == "images":
        images = training_images(config, few_pictures(config), torch.device("cpu"), ranks)
        options["images"] = Delivery(images, RecordedImageLane(), slots=True)
    return Trainer(method, make_schedule(config), RunFolder("nowhere"), {}, graphs=graphs, ranks=ranks, **options)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that its checkpoint has, by part and name."""
    parts = trainer._checkpoint().parts
    return {f"{part}.{name}": tensor.clone() for part, state in parts.items() for name, tensor in state.items()}


def resumed_equals_whole(config: Config) -> set[str]:
    """Asserts that five steps, and two that are saved and restored with three after them, end in the same bits.

    Returns the names in `everything` that the last three steps changed.
    """
    whole, first, second = (small_trainer(config) for _ in range(3))
    for _ in range(5):
        whole.train_step()
    for _ in range(2):
        first.train_step()
    second.restore(through_a_file(first._checkpoint()))
    before = everything(second)
    for _ in range(3):
        second.train_step()
    found, expected = everything(second), everything(whole)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert torch.equal(second.picture(), whole.picture())
    return {key for key in found if key not in before or not torch.equal(before[key], found[key])}


def through_a_file(checkpoint: Checkpoint) -> Checkpoint:
    with TemporaryDirectory() as folder:
        checkpoint.save(Path(folder, "checkpoint"))
        return Checkpoint.load(Path(folder, "checkpoint"))


def device_step(trainer: Trainer) -> Callable[[AbstractContextManager[Any]], object]:
    """A whole step of `trainer`, with what a CUDA graph captures of it inside the context that the step is given."""
    captured = trainer._step

    def step(context: AbstractContextManager[Any]) -> object:
        def inside() -> Mapping[str, Tensor]:
            with context:
                return captured()

        trainer._step = inside  # type: ignore[method-assign]
        return trainer.train_step()

    return step
