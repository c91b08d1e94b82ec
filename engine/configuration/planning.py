"""Which chunk fits into how much memory: `--plan`, `--chunk-size auto` and `--memory-budget`."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from dataclasses import dataclass

import torch

from engine.configuration.autoencoding import needs_perceptual
from engine.configuration.build import Networks, bare_extractor, make_generator, make_networks
from engine.configuration.config import Config
from engine.configuration.groups import memory_bytes
from engine.configuration.inputs import amp_dtype, choose_device, neighbours
from engine.configuration.methods import ADVERSARIAL, WITH_TABLE
from engine.configuration.modelling import CPU, is_captured, libraries, predict
from engine.representation.feature_pass import RECOMPUTE
from engine.support.errors import InputError
from engine.training.planner import (
    Footprint,
    available_memory,
    num_bytes,
    shown_bytes,
)
from engine.training.ranks import ALONE, Ranks
from pipelines.memory import memory_limit

log = logging.getLogger("gfmn")

# What a run takes of the memory that is free where no budget is given. The model is within a tenth of the allocator's
# peak, and knows nothing of its fragmentation, nor of what other programs begin to take.
_SHARE_OF_FREE = 0.85

_NOTICEABLE = 256
"""Activations of a step are rarely more than so many times its images."""

TIME_MODEL = (
    "relative time: forward and backward of the whole minibatch = 1, two or more chunks + 0.5, stages + 0.5; "
    "the generator's further forwards are not counted"
)
_LAUNCHES = {False: 512, True: 64}
"""Images of a chunk that a GPU computes for as long as launching the chunk's kernels takes, without and with a CUDA
graph: estimated, 6 to 10 ms of launches against 1.2 to 1.6 ms of kernels for 64 images of the paper's pair."""


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


def _bare_networks(config: Config) -> Networks:
    """What the method has besides the generator, with random weights throughout: no file is read."""
    files = {"critic_weights": None} if config.method.method in ADVERSARIAL else {}
    return make_networks(config.replaced({"perceptual_weights": "random"} if needs_perceptual(config) else files))


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
        self.extractor = bare_extractor(config) if config.needs.features else None
        self.networks = _bare_networks(config)
        self.plan = functools.cache(self._plan)

    def _plan(self, chunk_size: int | None, recompute: str, recompute_generator: bool) -> Plan:
        given = {"chunk_size": chunk_size, "recompute": recompute} if self.config.needs.features else {}
        config = self.config.replaced({**given, "recompute_generator": recompute_generator})
        footprint = predict(config, self.generator, self.extractor, self.device, self.size, self.networks)
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
        if self.extractor is None or self.extractor.batch_statistics:
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
    if config.matching.chunk_size != "auto" or not config.needs.features:
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
    needed = Planner(config, device, size).configured(_own_chunk(config)).footprint.total
    if needed > budget:
        raise InputError(
            "memory_budget",
            f"these settings need {shown_bytes(needed)} (modelled), the budget is {shown_bytes(budget)}; "
            + ("try --chunk-size auto, or see --plan" if config.needs.features else "see --plan"),
        )


def _own_chunk(config: Config) -> int | None:
    return config.matching.images_per_chunk if config.needs.features else None


def _check_machine(config: Config, size: int) -> None:
    """InputError if a step of all ranks here is modelled to need more than the machine has.

    The system would kill it without a word. It takes seconds to model a step, so this is done only where the
    minibatch's images have a noticeable share.
    """
    training, memory = config.training, memory_limit()
    if training.batch_size * 3 * config.data.image_size**2 * 4 < memory / _NOTICEABLE:
        return
    own = Planner(config, size=size).configured(_own_chunk(config)).footprint.total
    needed = neighbours(size) * own
    if needed > memory:
        raise InputError(
            "batch_size",
            f"a step needs {shown_bytes(needed)} (modelled), this machine has {shown_bytes(memory)}; "
            + ("see --plan for what smaller chunks need, or " if config.needs.features else "")
            + "give a smaller --batch-size",
        )


def budget_bytes(config: Config, device: torch.device, size: int = 1) -> int:
    """`--memory-budget` in bytes, or else most of what is free on `device` for one of `size` ranks."""
    if config.matching.memory_budget is not None:
        return memory_bytes(config.matching.memory_budget)
    if device.type == "cuda":
        return int(_SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0])
    return int(_SHARE_OF_FREE * available_memory() / neighbours(size))


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
    frozen = () if planner.extractor is None else (planner.extractor,)
    weights = num_bytes(planner.generator, *planner.networks.values(), *frozen)
    included = f"weights included ({shown_bytes(weights)})"
    if device.type == "cuda":
        beside = sum(libraries(ranks.size).values())
        included += f", and what must be free beside it for libraries ({shown_bytes(beside)}), samples and evaluations"
    if config.method.method in WITH_TABLE:
        included += f", but for the codes of the real images ({12 * networks.nz} bytes each, with their moments)"
    if device.type == "cuda" and not config.needs.features and config.data.loader != "dali":
        included += "; not included: a data set of arrays, which the torch loader keeps whole on the GPU"
    print(
        f"{networks.extractor if frozen else config.method.method} "
        f"at {config.data.image_size}×{config.data.image_size}, {networks.generator} generator, "
        f"minibatch {batch}{shared}, {'float32' if low is None else str(low).removeprefix('torch.')}. "
        f"Everything is modelled, nothing measured.\npeak: bytes in a step, {included}; "
        f"{planner.time_model}.\nbudget: {shown_bytes(budget)}"
        + ("" if config.matching.memory_budget else f" ({_SHARE_OF_FREE:.0%} of what is free)")
    )
    print(f"{'chunk':>7}  {'recompute':<10}  {'generator':<12}  {'peak (modelled)':>15}  {'time (modelled)':>15}  fits")
    least, recompute = math.inf, RECOMPUTE if frozen else ("none",)
    for size in planner.chunk_sizes():
        plans = [planner.plan(size, *options) for options in itertools.product(recompute, (False, True))]
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
