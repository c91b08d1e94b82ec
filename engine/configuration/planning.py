"""Which chunk fits into how much memory: `--plan`, `--chunk-size auto` and `--memory-budget`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from engine.comparison.reference.bank import FeatureBank
from engine.configuration.build import bare_extractor, make_generator, make_method
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.configuration.groups import memory_bytes
from engine.configuration.inputs import amp_dtype, choose_device
from engine.configuration.objectives import blank_reference
from engine.configuration.updates import all_of
from engine.generation.networks import Generator
from engine.generation.priors import Noise, make_prior
from engine.generation.sampling import Sampler
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import RECOMPUTE
from engine.representation.zoo import make_network
from engine.support.errors import InputError
from engine.training.planner import (
    GPU_LIBRARIES,
    RANKS_LIBRARY,
    FakeMode,
    Footprint,
    available_memory,
    fake_copy,
    gpu_block,
    memory_limit,
    modelled_ranks,
    num_bytes,
    shown_bytes,
    track,
)
from engine.training.ranks import ALONE, Ranks
from kernels import reference

log = logging.getLogger("gfmn")

# All chunks but the first of a pass need the same memory: more of them only take time to model.
_MODELLED_CHUNKS = 3
# What a run takes of the memory that is free where no budget is given. The model is within a tenth of the allocator's
# peak, and knows nothing of its fragmentation, nor of what other programs begin to take.
_SHARE_OF_FREE = 0.85

_NOTICEABLE = 256
"""Activations of a step are rarely more than so many times its images."""

TIME_MODEL = (
    "relative time: forward and backward of the whole minibatch = 1, two or more chunks + 0.5, stages + 0.5; "
    "the generator's second forward is not counted"
)
_INCEPTION_SIZE, _JUDGED_AT_ONCE = 299, 128
"""Side of the images that Inception sees; images of `EvaluationNetwork.features` at a time."""
_LAUNCHES = {False: 512, True: 64}
"""Images of a chunk that a GPU computes for as long as launching the chunk's kernels takes, without and with a CUDA
graph: estimated, 6 to 10 ms of launches against 1.2 to 1.6 ms of kernels for 64 images of the paper's pair."""

CPU = torch.device("cpu")


def predict(
    config: Config, generator: Generator, extractor: Extractor, device: torch.device = CPU, size: int = 1
) -> Footprint:
    """The footprint of training as `config` says, on tensors of no memory, in about a second.

    It models the fused kernels, or with `--kernels reference` the plain ones and what they allocate. For a GPU it
    rounds as the allocator does, and adds libraries' workspaces and, beside the pool of a step that is captured in a
    CUDA graph, what samples and evaluations need (`Footprint.beside`). PyTorch may choose other kernels there than on
    a CPU, with other layouts: that is not modelled.

    Args:
        config: `chunk_size` must be a number or None.
        generator, extractor: on the CPU, of the right shapes; they are only looked at.
        device: where training is to run.
        size: number of ranks. The footprint is one rank's, of the largest share of the minibatch; what all ranks tell
            it, W·2·D moments or N·F pooled features, is there as long as it is in a step.
    """
    mode, on_gpu = FakeMode(), device.type == "cuda"
    block = gpu_block if on_gpu else int
    dtype = amp_dtype(config)
    backend = _plain_kernels() if config.matching.backend == "reference" else reference
    options: dict[str, Any] = {"kernels": backend, "max_chunks": _MODELLED_CHUNKS}
    weighted = config.method.method == "gfmn" and config.gfmn.feature_scale != "none"
    fake_generator, fake_extractor = fake_copy(generator, mode), fake_copy(extractor, mode, dtype)

    def build() -> Callable[[], object]:
        # Fake tensors have no numbers to make weights or scales of.
        known = blank_reference(config, fake_extractor)
        if weighted:
            options["weights"] = torch.empty(extractor.num_features, dtype=torch.float64)
        if isinstance(known, FeatureBank):
            options["scales"] = torch.empty(known.features.shape[1])
        method = make_method(config, fake_generator, fake_extractor, known, ranks=ranks, **options)
        return functools.partial(method.step, None, Noise(config.training.seed))

    with modelled_ranks(size) as ranks:
        footprint = track(build, mode, [fake_generator, fake_extractor], block, gloo=not on_gpu)
    # A moving average of the generator is a copy of it; the low-precision copy of the extractor was there before.
    extra = num_bytes(generator, block=block) * len(all_of(config.training.generator_ema))
    extra += 0 if dtype is None else num_bytes(fake_extractor, block=block)
    weights = num_bytes(generator, extractor, block=block)
    between, peak = footprint.between_steps + extra, footprint.peak + extra
    if not on_gpu:
        return Footprint(weights, between, peak)
    apart = _outside_steps(config, generator)
    if not is_captured(config):  # then what a step has freed serves
        apart = max(between + apart - peak, 0)
    return Footprint(weights, between, peak, apart + sum(_libraries(size).values()))


def _libraries(size: int) -> dict[str, int]:
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


@dataclass(frozen=True)
class Plan:
    """One way to train the same thing.

    Attributes:
        chunk_size, recompute, recompute_generator: as in the configuration.
        footprint: modelled.
        batch_size: images of a minibatch that a rank has.
        launches: a chunk takes at least as long as one of so many images.
        relative_time: modelled, of a step (see `TIME_MODEL`).
    """

    chunk_size: int | None
    recompute: str
    recompute_generator: bool
    footprint: Footprint
    batch_size: int
    launches: int = 0

    @property
    def relative_time(self) -> float:
        """See `TIME_MODEL`."""
        chunks = -(-self.batch_size // (self.chunk_size or self.batch_size))
        launched = max(self.batch_size, chunks * self.launches) / max(self.batch_size, self.launches)
        return launched * (1 + 0.5 * (self.chunk_size is not None) + 0.5 * (self.recompute == "stages"))


class Planner:
    """Predictions for one configuration, each made once.

    The networks are built with random weights on the CPU: what is in them does not matter.

    Args:
        config: what to plan.
        device: where it is to run.
        size: number of ranks.

    Attributes:
        share: images of a minibatch that the rank with the most of them has.
    """

    def __init__(self, config: Config, device: torch.device = CPU, size: int = 1):
        self.config, self.device, self.size = config, device, size
        self.share = -(-config.training.batch_size // size)
        self.launches = _LAUNCHES[is_captured(config)] if device.type == "cuda" else 0
        self.generator = make_generator(config)
        self.extractor = bare_extractor(config)
        self.plan = functools.cache(self._plan)

    def _plan(self, chunk_size: int | None, recompute: str, recompute_generator: bool) -> Plan:
        config = self.config.replaced(
            {"chunk_size": chunk_size, "recompute": recompute, "recompute_generator": recompute_generator}
        )
        footprint = predict(config, self.generator, self.extractor, self.device, self.size)
        return Plan(chunk_size, recompute, recompute_generator, footprint, self.share, self.launches)

    @property
    def time_model(self) -> str:
        """What `Plan.relative_time` is, for people."""
        if not self.launches:
            return TIME_MODEL
        return f"{TIME_MODEL}; a chunk takes at least as long as one of {self.launches} images, to launch its kernels"

    def configured(self, chunk_size: int | None) -> Plan:
        """The configuration's own, but for the chunk."""
        return self.plan(chunk_size, self.config.matching.recompute, self.config.training.recompute_generator)

    def chunk_sizes(self) -> list[int | None]:
        """The whole share (None), then half of it, a quarter, and so on to one image; equal chunks, rounded up."""
        if self.config.networks.extractor_bn == "batch":
            return [None]
        halvings = range(1, self.share.bit_length() + 1)
        return [None, *dict.fromkeys(-(-self.share // 2**halving) for halving in halvings)]

    def largest_chunk(self, budget: int) -> Plan:
        """The plan with the largest chunk that fits `budget` bytes, weights included; InputError if none does."""
        sizes = self.chunk_sizes()
        smallest = self.configured(sizes[-1])
        if smallest.footprint.total > budget:
            chunk = (
                "the whole minibatch at once (--extractor-bn batch)" if len(sizes) == 1 else "even a chunk of 1 image"
            )
            raise InputError(
                "memory_budget",
                f"{chunk} needs {shown_bytes(smallest.footprint.total)} (modelled), "
                f"the budget is {shown_bytes(budget)}{self._advice()}",
            )
        return next(plan for plan in map(self.configured, sizes) if plan.footprint.total <= budget)

    def _advice(self) -> str:
        if not self.config.training.recompute_generator:
            return "; --recompute-generator (see --plan) or a smaller --batch-size needs less"
        return "; a smaller --batch-size needs less"


def choose_chunk(config: Config, device: torch.device, ranks: Ranks = ALONE) -> Config:
    """`config` with a number in place of `--chunk-size auto`, the smallest that any of `ranks` takes for its share of
    the minibatch; InputError if it cannot fit `--memory-budget`, or all the memory of a machine without a GPU.

    To be asked before anything is on a GPU: what comes there before training is either part of the model (the networks,
    the target) or given back (`release_memory`). And before ranks have exchanged tensors (`modelled_ranks`).
    """
    if config.matching.chunk_size != "auto":
        _check_budget(config, device, ranks.size)
        return config
    planner = Planner(config, device, ranks.size)
    own = planner.largest_chunk(budget_bytes(config, device, ranks.size)).chunk_size
    chunk: int = min(ranks.meet("chunk", own or planner.share))
    whole = chunk == planner.share
    if not whole and chunk < planner.launches:
        log.info(
            "--chunk-size auto: %d images fit, and a GPU waits for the launches of chunks below %d (modelled); "
            "--plan lists what fits more",
            chunk,
            planner.launches,
        )
    return config.replaced({"chunk_size": None if whole else chunk})


def _check_budget(config: Config, device: torch.device, size: int) -> None:
    """InputError if a step with the configuration's own chunk does not fit `--memory-budget` or the machine."""
    if config.matching.memory_budget is None:
        if device.type == "cpu":
            _check_machine(config, size)
        return
    budget = budget_bytes(config, device, size)
    needed = Planner(config, device, size).configured(config.matching.images_per_chunk).footprint.total
    if needed > budget:
        raise InputError(
            "memory_budget",
            f"these settings need {shown_bytes(needed)} (modelled), the budget is "
            f"{shown_bytes(budget)}; try --chunk-size auto, or see --plan",
        )


def _check_machine(config: Config, size: int) -> None:
    """InputError if a step of all ranks here is modelled to need more than the machine has.

    The system would kill it without a word. It takes seconds to model a step, so this is done only where the
    minibatch's images have a noticeable share.
    """
    training, memory = config.training, memory_limit()
    if training.batch_size * 3 * config.data.image_size**2 * 4 < memory / _NOTICEABLE:
        return
    own = Planner(config, size=size).configured(config.matching.images_per_chunk).footprint.total
    needed = _neighbours(size) * own
    if needed > memory:
        raise InputError(
            "batch_size",
            f"a step needs {shown_bytes(needed)} (modelled), this machine has {shown_bytes(memory)}; see --plan for "
            "what smaller chunks need, or give a smaller --batch-size",
        )


def _neighbours(size: int) -> int:
    """Ranks of a job of `size` that share this machine's memory, as `torchrun` says: all, if it doesn't."""
    return min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def budget_bytes(config: Config, device: torch.device, size: int = 1) -> int:
    """`--memory-budget` in bytes, or else most of what is free on `device` for one of `size` ranks."""
    if config.matching.memory_budget is not None:
        return memory_bytes(config.matching.memory_budget)
    if device.type == "cuda":
        return int(_SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0])
    return int(_SHARE_OF_FREE * available_memory() / _neighbours(size))


def planned_device(config: Config) -> torch.device:
    """The device to plan for: that of the run, or a GPU that is not here if `--device cuda` asks for one.

    InputError if nothing tells how much memory that one has.
    """
    training = config.training
    if training.device != "cuda" or torch.cuda.is_available():
        return choose_device(training.device, training.threads, training.float32)
    if config.matching.memory_budget is None:
        raise InputError("memory_budget", "there is no GPU here to ask; give what it has, such as 80GiB")
    return torch.device("cuda")


def print_plans(config: Config, device: torch.device, ranks: Ranks = ALONE) -> None:
    """The table of `--plan`, on standard output of the first of `ranks`: what each of them needs for its share."""
    if ranks.rank > 0:
        return
    planner = Planner(config, device, ranks.size)
    budget = budget_bytes(config, device, ranks.size)
    batch = config.training.batch_size
    shared = "" if ranks.size == 1 else f" on {ranks.size} ranks (here: of the largest share, {planner.share})"
    networks = config.networks
    low = amp_dtype(config)
    weights = num_bytes(planner.generator, planner.extractor)
    included = f"weights included ({shown_bytes(weights)})"
    if device.type == "cuda":
        libraries = sum(_libraries(ranks.size).values())
        included += (
            f", and what must be free beside it for libraries ({shown_bytes(libraries)}), samples and evaluations"
        )
    print(
        f"{networks.extractor} at {config.data.image_size}×{config.data.image_size}, {networks.generator} generator, "
        f"minibatch {batch}{shared}, {'float32' if low is None else str(low).removeprefix('torch.')}. "
        f"Everything is modelled, nothing measured.\npeak: bytes in a step, {included}; "
        f"{planner.time_model}.\nbudget: {shown_bytes(budget)}"
        + ("" if config.matching.memory_budget else f" ({_SHARE_OF_FREE:.0%} of what is free)")
    )
    print(f"{'chunk':>7}  {'recompute':<10}  {'generator':<12}  {'peak (modelled)':>15}  {'time (modelled)':>15}  fits")
    least = math.inf
    for size in planner.chunk_sizes():
        plans = [planner.plan(size, *options) for options in itertools.product(RECOMPUTE, (False, True))]
        for plan in plans:
            total = plan.footprint.total
            generator = "recomputed" if plan.recompute_generator else "kept"
            print(
                f"{size or planner.share:>7}  {plan.recompute:<10}  {generator:<12}  {shown_bytes(total):>15}  "
                f"{plan.relative_time:>15.1f}  {'yes' if total <= budget else 'no'}"
            )
        before, least = least, min(plan.footprint.total for plan in plans)
        if least > 0.99 * before:
            print(f"{'less':>7}  makes no difference: what is left does not depend on the chunk")
            break
