"""What memory training as configured needs, from a step on tensors of no memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from engine.comparison.reference.bank import FeatureBank
from engine.configuration.build import Networks, make_method
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.configuration.inputs import amp_dtype
from engine.configuration.methods import WITH_TABLE
from engine.configuration.objectives import blank_reference
from engine.configuration.updates import all_of
from engine.generation.networks import Generator
from engine.generation.priors import Noise, make_prior
from engine.generation.sampling import Sampler
from engine.methods.protocols import Method
from engine.representation.extractor import Extractor
from engine.representation.zoo import make_network
from engine.training.planner import (
    GPU_LIBRARIES,
    RANKS_LIBRARY,
    FakeMode,
    Footprint,
    fake_copy,
    gpu_block,
    modelled_ranks,
    num_bytes,
    track,
)
from engine.training.ranks import Ranks
from kernels import reference
from pipelines import Batch

# All chunks but the first of a pass need the same memory: more of them only take time to model.
_MODELLED_CHUNKS = 3
_INCEPTION_SIZE, _JUDGED_AT_ONCE = 299, 128
"""Side of the images that Inception sees; images of `EvaluationNetwork.features` at a time."""

_PHASES = {"glann": "glo_steps", "gmmn-ae": "autoencoder_steps"}
"""The methods whose steps are of two kinds, and how many are of the first; two of each are modelled."""

CPU = torch.device("cpu")


def predict(
    config: Config,
    generator: Generator,
    extractor: Extractor | None,
    device: torch.device = CPU,
    size: int = 1,
    networks: Networks | None = None,
    images: int | None = None,
) -> Footprint:
    """The footprint of training as `config` says, on tensors of no memory, in about a second.

    It models the fused kernels, or with `--kernels reference` the plain ones and what they allocate. For a GPU it
    rounds as the allocator does, and adds libraries' workspaces and, beside the pool of a step that is captured in a
    CUDA graph, what samples and evaluations need (`Footprint.beside`). PyTorch may choose other kernels there than on
    a CPU, with other layouts: that is not modelled.

    Args:
        config: `chunk_size` must be a number or None.
        generator, extractor: on the CPU, of the right shapes; they are only looked at. None for a method that compares
            no features.
        networks: what such a method trains besides the generator, likewise.
        device: where training is to run.
        size: number of ranks. The footprint is one rank's, of the largest share of the minibatch; what all ranks tell
            it, W·2·D moments or N·F pooled features, is there as long as it is in a step.
        images: real ones of the data set; None for as many as can matter.
    """
    mode, on_gpu = FakeMode(), device.type == "cuda"
    block = gpu_block if on_gpu else int
    dtype = amp_dtype(config)
    fake_generator = fake_copy(generator, mode)
    fake_extractor = None if extractor is None else fake_copy(extractor, mode, dtype)
    frozen = () if extractor is None else (extractor,)
    fake_frozen = () if extractor is None else (fake_extractor,)
    others = networks or {}
    fake_others = {name: fake_copy(network, mode) for name, network in others.items()}

    def build() -> Callable[[], object]:
        method = _modelled_method(config, fake_generator, fake_extractor, fake_others, ranks, images)
        batches = _modelled_images(config, ranks) if method.reads == "images" else None
        return functools.partial(method.step, batches, Noise(config.training.seed))

    with modelled_ranks(size) as ranks:
        fakes = [fake_generator, *fake_others.values(), *fake_frozen]
        steps = 4 if config.method.method in _PHASES else 2
        footprint = track(build, mode, fakes, block, gloo=not on_gpu, steps=steps)
    # A moving average of the generator is a copy of it; the low-precision copy of the extractor was there before.
    extra = num_bytes(generator, block=block) * len(all_of(config.training.generator_ema))
    extra += 0 if dtype is None else num_bytes(*fake_frozen, block=block)
    weights = num_bytes(generator, *others.values(), *frozen, block=block)
    between, peak = footprint.between_steps + extra, footprint.peak + extra
    if not on_gpu:
        return Footprint(weights, between, peak)
    apart = _outside_steps(config, generator)
    if not is_captured(config):  # then what a step has freed serves
        apart = max(between + apart - peak, 0)
    return Footprint(weights, between, peak, apart + sum(libraries(size).values()))


def _modelled_method(
    config: Config,
    generator: Generator,
    extractor: Extractor | None,
    networks: Networks,
    ranks: Ranks,
    images: int | None,
) -> Method:
    """The configured method on networks of fake tensors."""
    if config.method.method == "molm":  # whose steps are alike, and so are minibatches whose moments are added
        config = config.replaced({"moment_steps": 1, "moment_images": 2 * config.training.batch_size})
    if config.method.method in _PHASES:
        config = config.replaced({_PHASES[config.method.method]: 2, "steps": max(config.training.steps, 4)})
    if extractor is None:
        known: dict[str, Any] = {"images": images} if config.method.method in WITH_TABLE else {}
        if config.method.method == "improved-gan" and config.game.classes is not None:
            known["labels"] = torch.zeros(1, dtype=torch.int64)
        # Those of the run may not run here.
        plain = config.replaced({"kernels": "reference"})
        return make_method(plain, generator, ranks=ranks, networks=networks, **known)
    backend = _plain_kernels() if config.matching.backend == "reference" else reference
    options: dict[str, Any] = {"kernels": backend, "max_chunks": _MODELLED_CHUNKS}
    # Fake tensors have no numbers to make weights or scales of.
    found = blank_reference(config, extractor, images=images)
    if config.method.method == "gfmn" and config.gfmn.feature_scale != "none":
        options["weights"] = torch.empty(extractor.num_features, dtype=torch.float64)
    if isinstance(found, FeatureBank):
        options["scales"] = torch.empty(found.features.shape[1])
    return make_method(config, generator, extractor, found, ranks=ranks, **options)


def _modelled_images(config: Config, ranks: Ranks) -> Iterator[Batch]:
    """A rank's minibatches of real images, of fake tensors; each is new memory."""
    rows, side = ranks.share(config.training.batch_size), config.data.image_size
    count = rows.stop - rows.start
    while True:
        yield Batch(torch.empty(count, 3, side, side), torch.empty(count, dtype=torch.int64))


def libraries(size: int) -> dict[str, int]:
    """Bytes that each library takes of a GPU, with so many ranks."""
    return GPU_LIBRARIES if size == 1 else {**GPU_LIBRARIES, **RANKS_LIBRARY}


def is_captured(config: Config) -> bool:
    """Whether a step on a GPU is replayed from a CUDA graph, as far as settings tell."""
    asked = config.training.cuda_graph is not False and config.matching.backend in ("auto", "triton")
    return asked and config.needs.captured


def _outside_steps(config: Config, generator: Generator) -> int:
    """Bytes that drawing samples, or evaluating them, takes of a GPU while no step runs, whichever is more."""
    mode, networks = FakeMode(), config.networks
    sampler = Sampler(make_prior(networks.prior, networks.nz), generator, networks.sample_bn == "batch")
    copied = fake_copy(generator, mode).train(sampler.batch_statistics)

    def sampling() -> Callable[[], object]:
        return torch.no_grad()(lambda: copied(torch.empty(sampler.batch_size, networks.nz)))

    drawn = track(sampling, mode, [copied], gpu_block)
    needed = drawn.weights + drawn.peak
    if config.validation.evaluate_every is None:
        return needed
    kept, peak = 0, 0  # weights of judges stay on the device
    for name, _ in config.validation.judges:
        # Of another network for Inception's numbers, torchvision's has the same layers; both see images of 299 pixels.
        size = _INCEPTION_SIZE if name is None else config.data.image_size
        with arguments_as(name=config.validation.named_in):
            judge = fake_copy(make_network(name or "torchvision:inception_v3", size).module, mode)

        def judging(judge: nn.Module = judge, size: int = size) -> Callable[[], object]:
            return torch.no_grad()(lambda: judge(torch.empty(_JUDGED_AT_ONCE, 3, size, size)))

        with contextlib.suppress(RuntimeError, AssertionError, ValueError):  # images that `make_validation` refuses
            judged = track(judging, mode, [judge], gpu_block)
            kept, peak = kept + judged.weights, max(peak, judged.peak)
    return max(needed, kept + peak)


def _plain_kernels() -> Any:
    """The reference backend without its operators, which hide what is allocated inside."""
    names = ("relu_moments", "relu_moments_backward", "averager_step")
    return SimpleNamespace(__name__="reference", **{name: getattr(reference, name).__wrapped__ for name in names})
