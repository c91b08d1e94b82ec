"""How much memory a training step will need, and which chunk fits: worked out on tensors without memory.

A step of the real trainer runs twice on fake CPU tensors (PyTorch's FakeTensorMode: shapes and strides, no data) while
a dispatch mode sees every storage come and go. Nothing here knows what a step consists of, so whatever the engine
learns to do is modelled as it is written.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine.comparison.distances.moments import Moments
from engine.configuration.build import make_objective
from engine.configuration.config import Config, memory_bytes
from engine.generation.networks import build_generator
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import CHECKPOINTS
from engine.support.errors import InputError
from engine.support.files import total_memory
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer, amp_dtype
from kernels import reference

# All chunks but the first of a pass need the same memory: more of them only take time to model.
_MODELLED_CHUNKS = 3
# What a run takes of the memory that is free where no budget is given. The model is within a tenth of the allocator's
# peak, and knows nothing of what lies outside it (CUDA's context, workspaces of libraries, the loader's images).
_SHARE_OF_FREE = 0.85

TIME_MODEL = (
    "relative time: forward and backward of the whole minibatch = 1, two or more chunks + 0.5, stages + 0.5; "
    "the generator's second forward is not counted"
)


@dataclass(frozen=True)
class Footprint:
    """Bytes that training is modelled to need.

    Attributes:
        weights: parameters and buffers of generator and extractor, as they were before anything else was made.
        between_steps: what else is there between two steps: the low-precision copy of the extractor, the
            target, the averager's and the optimizer's state, the moving average of the generator, the generator's
            gradients.
        peak: the most that is there at the same time during a step besides the weights: `between_steps`, images,
            activations, moments, coefficients, gradients, and what operators return to each other.
    """

    weights: int
    between_steps: int
    peak: int

    @property
    def total(self) -> int:
        """Bytes with the weights."""
        return self.weights + self.peak


class FakeMode(FakeTensorMode):
    """FakeTensorMode whose tensors can be copied with the modules that hold them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeMode:
        return self


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, for as long as anybody holds them.

    Views share their storage and in-place operators make none. What an operator allocates for itself and frees before
    it returns is not seen: neither a library's workspaces, nor PyTorch's own kernels from the inside.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()):
        """Storages of `ignored` don't count."""
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in ignored)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.count(value)
        return result

    def count(self, tensor: Tensor) -> None:
        """`tensor`'s storage from now on until it goes."""
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def fake_copy(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> Any:
    """`module` with fake CPU tensors (the floating ones in `dtype`) in place of its own. Allocates nothing."""
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*module.parameters(), *module.buffers()):
            kept = dtype is None or not tensor.is_floating_point()
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype if kept else dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
    return copy.deepcopy(module, memo)


def num_bytes(*modules: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


def track(build: Callable[[], Callable[[], object]], mode: FakeTensorMode, weights: Sequence[nn.Module]) -> Footprint:
    """The footprint of the step that `build()` returns, from its second call: then all optimizer state exists.

    Args:
        build: runs under `mode`; makes everything that a step needs besides `weights`, on fake tensors.
        weights: modules with fake tensors, which don't count.
    """
    tensors = [tensor for module in weights for tensor in (*module.parameters(), *module.buffers())]
    tracker = StorageTracker(tensors)
    with mode, tracker:
        step = build()
        step()
        tracker.peak = between_steps = tracker.now
        step()
    return Footprint(sum(tensor.nbytes for tensor in tensors), between_steps, tracker.peak)


def fake_target(num_features: int) -> Moments:
    """Some target, to be called under a fake mode."""
    mean = torch.zeros(num_features, dtype=torch.float64)
    return Moments(2, mean, mean)


def predict(config: Config, generator: nn.Module, extractor: Extractor) -> Footprint:
    """The footprint of training as `config` says, on tensors of no memory, in about a second.

    It models the fused kernels, or with `--kernels reference` the plain ones and what they allocate. On CUDA the
    allocator rounds every block up, which adds a few percent. Under `--device cuda` PyTorch may choose other kernels
    than on a CPU, with other layouts and workspaces: neither is modelled.

    Args:
        config: `chunk_size` must be a number or None.
        generator, extractor: on the CPU, of the right shapes; they are only looked at.
    """
    mode = FakeMode()
    dtype = amp_dtype(config)
    plain = config.matching.backend == "reference"
    ema = config.training.generator_ema is not None
    weighted = config.matching.feature_scale != "none"
    # What looks at numbers, which fake tensors don't have, is put there by hand: a moving average reads its own count
    # of steps (it is one copy of the generator), and the weights of features need a target that varies.
    config = config.replaced(
        {"generator_ema": None, "feature_scale": "none", "kernels": "reference", "fused_ama": True, "device": "cpu"}
    )
    fake_generator, fake_extractor = fake_copy(generator, mode), fake_copy(extractor, mode, dtype)

    def build() -> Callable[[], object]:
        objective = make_objective(config, fake_extractor, fake_target(extractor.num_features), dtype)
        if weighted:
            objective.weight = torch.empty_like(objective.target.mean)
        if plain:
            objective.kernels = _plain_kernels()
        features = objective.feature_pass
        split = features.chunks
        most = _MODELLED_CHUNKS * (features.chunk_size or config.training.batch_size)
        features.chunks = lambda images: split(images[:most])  # type: ignore[method-assign]
        return Trainer(fake_generator, objective, config, RunFolder("nowhere"), {}).train_step

    footprint = track(build, mode, [fake_generator, fake_extractor])
    low = 0 if dtype is None else num_bytes(fake_extractor)
    extra = low + (num_bytes(generator) if ema else 0)
    return Footprint(num_bytes(generator, extractor), footprint.between_steps + extra, footprint.peak + extra)


def _plain_kernels() -> Any:
    """The reference backend without its operators, which hide what is allocated inside."""
    names = ("relu_moments", "relu_moments_backward", "averager_step")
    return SimpleNamespace(__name__="reference", **{name: getattr(reference, name).__wrapped__ for name in names})


@dataclass(frozen=True)
class Plan:
    """One way to train the same thing.

    Attributes:
        chunk_size, checkpoint, checkpoint_generator: as in the configuration.
        footprint: modelled.
        relative_time: modelled, of a step (see `TIME_MODEL`).
    """

    chunk_size: int | None
    checkpoint: str
    checkpoint_generator: bool
    footprint: Footprint

    @property
    def relative_time(self) -> float:
        """See `TIME_MODEL`."""
        return 1 + 0.5 * (self.chunk_size is not None) + 0.5 * (self.checkpoint == "stages")


class Planner:
    """Predictions for one configuration, each made once.

    The networks are built with random weights on the CPU: what is in them does not matter.
    """

    def __init__(self, config: Config):
        networks, size = config.networks, config.data.image_size
        self.config = config
        self.generator = build_generator(networks.generator, image_size=size, nz=networks.nz)
        self.extractor = build_extractor(
            networks.extractor,
            image_size=size,
            layers=networks.layers,
            layers_from=networks.layers_from,
            taps=networks.taps,
            bn=networks.extractor_bn,
        )
        self.plan = functools.cache(self._plan)

    def _plan(self, chunk_size: int | None, checkpoint: str, checkpoint_generator: bool) -> Plan:
        config = self.config.replaced(
            {"chunk_size": chunk_size, "checkpoint": checkpoint, "checkpoint_generator": checkpoint_generator}
        )
        footprint = predict(config, self.generator, self.extractor)
        return Plan(chunk_size, checkpoint, checkpoint_generator, footprint)

    def configured(self, chunk_size: int | None) -> Plan:
        """The configuration's own, but for the chunk."""
        return self.plan(chunk_size, self.config.matching.checkpoint, self.config.training.checkpoint_generator)

    def chunk_sizes(self) -> list[int | None]:
        """The whole minibatch (None), then half of it, a quarter, and so on to one image; equal chunks, rounded up."""
        if self.config.networks.extractor_bn == "batch":
            return [None]
        batch = self.config.training.batch_size
        halvings = range(1, batch.bit_length() + 1)
        return [None, *dict.fromkeys(-(-batch // 2**halving) for halving in halvings)]

    def largest_chunk(self, budget: int) -> Plan:
        """The plan with the largest chunk that fits `budget` bytes, weights included; InputError if none does."""
        sizes = self.chunk_sizes()
        smallest = self.configured(sizes[-1])
        if smallest.footprint.total > budget:
            chunk = (
                "the whole minibatch at once (--extractor-bn batch)" if len(sizes) == 1 else "even a chunk of 1 image"
            )
            raise InputError(
                f"--memory-budget: {chunk} needs {shown_bytes(smallest.footprint.total)} (modelled), "
                f"the budget is {shown_bytes(budget)}{self._advice()}"
            )
        return next(plan for plan in map(self.configured, sizes) if plan.footprint.total <= budget)

    def _advice(self) -> str:
        if not self.config.training.checkpoint_generator:
            return "; --checkpoint-generator (see --plan) or a smaller --batch-size needs less"
        return "; a smaller --batch-size needs less"


def choose_chunk(config: Config, device: torch.device) -> Config:
    """`config` with a number in place of `--chunk-size auto`; InputError if it cannot fit `--memory-budget`."""
    automatic = config.matching.chunk_size == "auto"
    if not automatic and config.matching.memory_budget is None:
        return config
    planner = Planner(config)
    budget = budget_bytes(config, device)
    if automatic:
        return config.replaced({"chunk_size": planner.largest_chunk(budget).chunk_size})
    needed = planner.configured(cast("int | None", config.matching.chunk_size)).footprint.total
    if needed > budget:
        raise InputError(
            f"--memory-budget: these settings need {shown_bytes(needed)} (modelled), the budget is "
            f"{shown_bytes(budget)}; try --chunk-size auto, or see --plan"
        )
    return config


def budget_bytes(config: Config, device: torch.device) -> int:
    """`--memory-budget` in bytes, or else most of what is free on `device`."""
    if config.matching.memory_budget is not None:
        return memory_bytes(config.matching.memory_budget)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return int(_SHARE_OF_FREE * free)


def available_memory() -> int:
    """Bytes of RAM that can be had without swapping: Linux's MemAvailable within the control group's limit, elsewhere
    free pages or half of all."""
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        return min(_available(), int(limit.read_text()) - int(used.read_text()))
    return _available()


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return total_memory() // 2
    raise InputError("--chunk-size: auto can't tell how much memory is free here; give --memory-budget")


def shown_bytes(count: float) -> str:
    """Such as "1.50 GiB", or "12.3 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def print_plans(config: Config, device: torch.device) -> None:
    """The table of `--plan`, on standard output."""
    planner = Planner(config)
    budget = budget_bytes(config, device)
    batch = config.training.batch_size
    networks = config.networks
    low = amp_dtype(config)
    weights = num_bytes(planner.generator, planner.extractor)
    print(
        f"{networks.extractor} at {config.data.image_size}×{config.data.image_size}, {networks.generator} generator, "
        f"minibatch {batch}, {'float32' if low is None else str(low).removeprefix('torch.')}. Everything is modelled, "
        f"nothing measured.\npeak: bytes in a step, weights included ({shown_bytes(weights)}); "
        f"{TIME_MODEL}.\nbudget: {shown_bytes(budget)}"
        + ("" if config.matching.memory_budget else f" ({_SHARE_OF_FREE:.0%} of what is free)")
    )
    print(
        f"{'chunk':>7}  {'checkpoint':<10}  {'generator':<12}  {'peak (modelled)':>15}  {'time (modelled)':>15}  fits"
    )
    least = math.inf
    for size in planner.chunk_sizes():
        plans = [planner.plan(size, *options) for options in itertools.product(CHECKPOINTS, (False, True))]
        for plan in plans:
            total = plan.footprint.total
            generator = "checkpointed" if plan.checkpoint_generator else "kept"
            print(
                f"{size or batch:>7}  {plan.checkpoint:<10}  {generator:<12}  {shown_bytes(total):>15}  "
                f"{plan.relative_time:>15.1f}  {'yes' if total <= budget else 'no'}"
            )
        before, least = least, min(plan.footprint.total for plan in plans)
        if least > 0.99 * before:
            print(f"{'less':>7}  makes no difference: what is left does not depend on the chunk")
            break
