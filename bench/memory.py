"""`python -m bench.memory`: the memory of a training step against the minibatch, beside the naive implementation.

*Measured* is the most that PyTorch's allocator holds at the same time beyond the weights, from before objective and
optimizer are made to the end of the second step, each variant in a process of its own, where at most
`--measure-up-to` is predicted. *Modelled* is the same number from `engine.training.planner`, which allocates nothing:
it is there for every size. *Resident* is the largest size of that whole process, Python and libraries included.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.naive import NaiveMatching
from bench.rows import environment, peak_memory, table, write_json
from engine.comparison.averagers import AMA
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.configuration.build import make_objective
from engine.configuration.command import Parser, run_command
from engine.configuration.config import Config, memory_bytes
from engine.generation.networks import build_generator
from engine.representation.build import build_extractor
from engine.representation.zoo import make_network
from engine.training.planner import FakeMode, Footprint, fake_copy, fake_target, predict, shown_bytes, track
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer, amp_dtype

NZ = 100
GIB = 2**30
BUDGETS = (12, 16, 24, 80)
# What is said to fit is said with an error of at most this share, on the safe side.
_PRECISION = 0.005


@dataclass(frozen=True)
class Variant:
    """What is compared: the naive implementation with its switches, or flags of `engine.train`."""

    name: str
    dtype: str = "float32"
    naive: dict[str, Any] | None = None
    flags: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("naive", naive={}),
    Variant("naive, frozen", naive={"frozen": True}),
    Variant("naive, frozen, autocast", "bf16", naive={"frozen": True, "autocast": torch.bfloat16}),
    Variant("ours"),
    Variant("ours --amp", "bf16", flags={"amp": True}),
    Variant("ours --amp --checkpoint stages", "bf16", flags={"amp": True, "checkpoint": "stages"}),
    Variant(
        "ours --amp --chunk-size 64 --checkpoint-generator",
        "bf16",
        flags={"amp": True, "chunk_size": 64, "checkpoint_generator": True},
    ),
)


@dataclass(frozen=True)
class Problem:
    """What is trained: extractor, side of the images, generator."""

    extractor: str
    image_size: int
    generator: str


CAPACITY_PROBLEMS = (Problem("vgg19", 64, "dcgan"), Problem("vgg19", 128, "resnet"))


@dataclass(frozen=True)
class MemoryRow:
    """One variant at one minibatch.

    Attributes:
        variant, dtype, extractor, generator, image_size, minibatch: what was trained, and how.
        weights: bytes of parameters and buffers, which are not in the other numbers.
        modelled: bytes at the peak of a step beyond the weights, by `engine.training.planner`.
        measured: the same by PyTorch's allocator; None where it was not measured.
        resident: bytes, the largest size of the process that was measured.
        environment: see `bench.rows.environment`.
    """

    variant: str
    dtype: str
    extractor: str
    generator: str
    image_size: int
    minibatch: int
    weights: int
    modelled: int
    measured: int | None
    resident: int | None
    environment: dict[str, Any] = field(default_factory=environment, repr=False)


@dataclass(frozen=True)
class ScaleRow:
    """What one more image costs a variant.

    Attributes:
        modelled, measured: bytes an image, between the two largest minibatches that were modelled or measured.
    """

    variant: str
    dtype: str
    extractor: str
    generator: str
    image_size: int
    modelled: float
    measured: float | None
    environment: dict[str, Any] = field(default_factory=environment, repr=False)


@dataclass(frozen=True)
class CapacityRow:
    """The largest minibatch (modelled) whose step fits `budget` bytes, weights included; 0 if none does."""

    variant: str
    dtype: str
    extractor: str
    generator: str
    image_size: int
    budget: int
    minibatch: int
    environment: dict[str, Any] = field(default_factory=environment, repr=False)


def configuration(variant: Variant, problem: Problem, minibatch: int) -> Config:
    """The run's. A chunk is at most the minibatch."""
    flags = dict(variant.flags)
    if flags.get("chunk_size", 0) > minibatch:
        del flags["chunk_size"]
    return Config.build(
        "cifar10",
        {
            "weights": ("random",), "extractor": problem.extractor, "image_size": problem.image_size,
            "generator": problem.generator, "batch_size": minibatch, "nz": NZ, **flags,
        },
    )  # fmt: skip


@functools.lru_cache(maxsize=4)
def _ours(problem: Problem) -> tuple[nn.Module, Any]:
    generator = build_generator(problem.generator, image_size=problem.image_size, nz=NZ)
    return generator, build_extractor(problem.extractor, image_size=problem.image_size)


@functools.lru_cache(maxsize=4)
def _naive(problem: Problem) -> tuple[nn.Module, nn.ModuleList, int]:
    """Generator, plain networks, D."""
    generator, extractor = _ours(problem)
    networks = (make_network(part, problem.image_size).module for part in problem.extractor.split("+"))
    return generator, nn.ModuleList(networks), extractor.num_features


def naive_step(
    variant: Variant, generator: nn.Module, networks: nn.ModuleList, target: Moments, minibatch: int
) -> Callable[[], object]:
    """A training step as one would write it, on the generator's device."""
    assert variant.naive is not None
    objective = NaiveMatching(list(networks), target, **variant.naive)
    low = variant.naive.get("autocast")
    adam = torch.optim.Adam(generator.parameters(), lr=5e-5, betas=(0.5, 0.999), fused=True)
    device = next(generator.parameters()).device

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(device.type, low, enabled=low is not None):
            images: Tensor = generator(torch.randn(minibatch, NZ, device=device))
        objective(images.float()).backward()
        adam.step()

    return step


def model(variant: Variant, problem: Problem, minibatch: int) -> Footprint:
    """What a step needs, without allocating it."""
    if variant.naive is None:
        return predict(configuration(variant, problem, minibatch), *_ours(problem))
    generator, networks, num_features = _naive(problem)
    mode = FakeMode()
    fakes = fake_copy(generator, mode), fake_copy(networks, mode)
    return track(lambda: naive_step(variant, *fakes, fake_target(num_features), minibatch), mode, fakes)


def measure(variant: Variant, problem: Problem, minibatch: int, device: torch.device) -> tuple[int, int]:
    """(allocator's peak beyond the weights, resident size), bytes. In this process: call it once."""
    torch.manual_seed(0)
    ones: Tensor
    if variant.naive is not None:
        generator, networks, num_features = _naive(problem)
        generator.to(device)
        networks.to(device)
    else:
        generator, extractor = _ours(problem)
        generator.to(device)
        extractor.to(device)
        num_features = extractor.num_features
    ones = torch.ones(num_features, dtype=torch.float64)
    target = Moments(2, ones, ones)

    def steps(images: int) -> None:
        if variant.naive is not None:
            step = naive_step(variant, generator, networks, target, images)
        else:
            config = configuration(variant, problem, images)
            objective = make_objective(config, extractor, target, amp_dtype(config))
            step = Trainer(generator, objective, config, RunFolder("nowhere"), {}).train_step
        step()
        step()

    steps(2)  # compiles
    for module in (generator, networks if variant.naive is not None else extractor):
        module.zero_grad(set_to_none=True)
    gc.collect()
    peak = peak_memory(lambda: steps(minibatch))
    unit = 1 if sys.platform == "darwin" else 1024
    return peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_apart(variant: Variant, problem: Problem, minibatch: int, device: torch.device) -> tuple[int, int]:
    """`measure` in a process of its own; RuntimeError with its last line if that fails."""
    given = [VARIANTS.index(variant), problem.extractor, problem.image_size, problem.generator, minibatch, str(device)]
    command = [sys.executable, "-m", "bench.memory", "--one", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{variant.name}, minibatch {minibatch}: not measured: {reason}")
    peak, resident = json.loads(done.stdout.strip().splitlines()[-1])
    return peak, resident


def memory_rows(
    problem: Problem, minibatches: Sequence[int], measure_up_to: int, device: torch.device
) -> list[MemoryRow]:
    """Every variant at every minibatch; measured where `measure_up_to` bytes are enough."""
    rows, where = [], environment()
    for variant in VARIANTS:
        for minibatch in minibatches:
            footprint = model(variant, problem, minibatch)
            measured: tuple[int | None, int | None] = (None, None)
            if footprint.total <= measure_up_to:
                measured = measure_apart(variant, problem, minibatch, device)
            print(f"{variant.name}, minibatch {minibatch}: {_shown(footprint.peak)} modelled, "
                  f"{_shown(measured[0])} measured", file=sys.stderr)  # fmt: skip
            rows.append(MemoryRow(
                variant.name, variant.dtype, problem.extractor, problem.generator, problem.image_size, minibatch,
                footprint.weights, footprint.peak, *measured, where,
            ))  # fmt: skip
    return rows


def scale_rows(rows: Sequence[MemoryRow]) -> list[ScaleRow]:
    """What one more image costs every variant that has two minibatches."""
    scales = []
    for name in dict.fromkeys(row.variant for row in rows):
        points = [row for row in rows if row.variant == name]
        slopes = [_slope(a, b, a.modelled, b.modelled) for a, b in pairwise(points)]
        measured = [
            _slope(a, b, a.measured, b.measured)
            for a, b in pairwise(points)
            if a.measured is not None and b.measured is not None
        ]
        if slopes:
            row = points[0]
            scales.append(ScaleRow(
                row.variant, row.dtype, row.extractor, row.generator, row.image_size, slopes[-1],
                measured[-1] if measured else None, row.environment,
            ))  # fmt: skip
    return scales


def _slope(a: MemoryRow, b: MemoryRow, low: int, high: int) -> float:
    return (high - low) / (b.minibatch - a.minibatch)


def largest_minibatch(total: Callable[[int], int], budget: int) -> int:
    """The largest N with `total(N)` ≤ `budget`, to `_PRECISION` and never too large; 0 if there is none from 2 on.

    `total` grows, in a line beyond some N: both ends of the bracket move by interpolation.
    """
    if total(2) > budget:
        return 0
    low, high = 2, 4
    while total(high) <= budget:
        low, high = high, 4 * high
    while high - low > max(1, _PRECISION * low):
        share = (budget - total(low)) / (total(high) - total(low))
        # A little off the line on both sides in turn, so that the bracket closes.
        step = max(1, int(_PRECISION * low / 2))
        middle = min(max(low + int(share * (high - low)) - step // 2, low + 1), high - 1)
        for candidate in (middle, min(middle + step, high - 1)):
            if low < candidate < high:
                low, high = (candidate, high) if total(candidate) <= budget else (low, candidate)
    return low


def capacity_rows(
    problems: Sequence[Problem], budgets: Sequence[int], variants: Sequence[Variant] = VARIANTS
) -> list[CapacityRow]:
    """The largest minibatch of every variant for every problem and budget (bytes)."""
    rows, where = [], environment()
    for problem in problems:
        for variant in variants:
            total = functools.cache(lambda n, v=variant, p=problem: model(v, p, n).total)
            for budget in budgets:
                rows.append(CapacityRow(
                    variant.name, variant.dtype, problem.extractor, problem.generator, problem.image_size, budget,
                    largest_minibatch(total, budget), where,
                ))  # fmt: skip
            print(f"{variant.name}, {problem.extractor} at {problem.image_size}: "
                  + ", ".join(str(row.minibatch) for row in rows[-len(budgets) :]), file=sys.stderr)  # fmt: skip
    return rows


@dataclass(frozen=True)
class SavedRow:
    """What autograd keeps of an extractor between forward and backward.

    Attributes:
        saved: bytes an image.
        floor: bytes an image of the taps alone, D · size of a number: the masks of backward are in them.
    """

    extractor: str
    image_size: int
    dtype: str
    saved: int
    floor: int
    environment: dict[str, Any] = field(default_factory=environment, repr=False)


def saved_row(problem: Problem, dtype: torch.dtype | None, device: torch.device) -> SavedRow:
    """Measured with autograd's own hooks, as the difference between minibatches of 4 and 2."""
    extractor = build_extractor(problem.extractor, image_size=problem.image_size).to(device)
    features = extractor.num_features
    ones = torch.ones(features, dtype=torch.float64)
    objective = MomentMatching(extractor, Moments(2, ones, ones), AMA(), amp_dtype=dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.extractor.parameters()}

    def saved(minibatch: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        size = problem.image_size
        images = torch.rand(minibatch, 3, size, size, device=device).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective(images)
        del loss
        return sum(count for address, count in storages.items() if address not in own)

    low = dtype or torch.float32
    name = str(low).removeprefix("torch.")
    return SavedRow(problem.extractor, problem.image_size, name, (saved(4) - saved(2)) // 2, features * low.itemsize)


def _shown(count: float | None) -> str:
    return "" if count is None else shown_bytes(count)


def print_rows(
    rows: Sequence[MemoryRow], scales: Sequence[ScaleRow], saved: Sequence[SavedRow], capacities: Sequence[CapacityRow]
) -> None:
    """The tables."""
    headings = ("variant", "minibatch", "modelled", "measured", "modelled / measured", "resident (whole process)")
    print(table(headings, [[
        row.variant, row.minibatch, _shown(row.modelled), _shown(row.measured),
        "" if row.measured is None else f"{row.modelled / row.measured:.3f}", _shown(row.resident),
    ] for row in rows]))  # fmt: skip
    print()
    print(table(("variant", "KiB for one more image, modelled", "measured"), [[
        row.variant, f"{row.modelled / 1024:.0f}", "" if row.measured is None else f"{row.measured / 1024:.0f}",
    ] for row in scales]))  # fmt: skip
    print()
    print(table(("saved for backward", "dtype", "KiB an image", "/ its taps"), [[
        f"{row.extractor} at {row.image_size}", row.dtype, f"{row.saved / 1024:.0f}", f"{row.saved / row.floor:.3f}",
    ] for row in saved]))  # fmt: skip
    if not capacities:
        return
    print()
    budgets = list(dict.fromkeys(row.budget for row in capacities))
    lines: dict[tuple[str, str], list[CapacityRow]] = {}
    for capacity in capacities:
        what = f"{capacity.extractor} at {capacity.image_size}, {capacity.generator}"
        lines.setdefault((what, capacity.variant), []).append(capacity)
    print(table(
        ("largest minibatch (modelled)", "variant", *(f"{budget / GIB:g} GiB" for budget in budgets)),
        [[*names, *(row.minibatch for row in found)] for names, found in lines.items()],
    ))  # fmt: skip


def plot(path: Path, rows: Sequence[MemoryRow]) -> None:
    """Peak against minibatch: lines are modelled, dots measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.variant for row in rows):
        points = [row for row in rows if row.variant == name]
        (line,) = axes.plot([row.minibatch for row in points], [row.modelled / GIB for row in points], label=name)
        known = [(row.minibatch, row.measured / GIB) for row in points if row.measured is not None]
        axes.plot(*zip(*known, strict=True), "o", color=line.get_color()) if known else None
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("minibatch, images")
    axes.set_ylabel("peak beyond the weights, GiB (lines: modelled, dots: measured)")
    axes.set_title(f"{rows[0].extractor} at {rows[0].image_size}×{rows[0].image_size}, {rows[0].generator} generator")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = Parser(
        prog="python -m bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--extractor", default="vgg19+resnet18", metavar="NAME")
    add("--image-size", type=int, default=32, metavar="PIXELS")
    add("--generator", choices=("dcgan", "resnet"), default="dcgan")
    add("--batch-sizes", type=int, nargs="+", default=[4**n for n in range(2, 8)], metavar="N",
        help="minibatches (default: 16 64 256 1024 4096 16384)")  # fmt: skip
    add("--measure-up-to", default="12GiB", metavar="SIZE",
        help="measure where the model says at most this, weights included (default: %(default)s)")  # fmt: skip
    add("--no-capacity", action="store_true", help="leave out the largest minibatches that fit 12, 16, 24 and 80 GiB")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, metavar="FILE", help="write the rows there too")
    add("--plot", type=Path, metavar="FILE", help="draw peak against minibatch")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one is not None:
        index, extractor, size, generator, minibatch, device = json.loads(args.one)
        result = measure(VARIANTS[index], Problem(extractor, size, generator), minibatch, torch.device(device))
        print(json.dumps(result))
        return
    limit = memory_bytes(args.measure_up_to, "measure-up-to")
    if min(args.batch_sizes) < 2:
        parser.error(f"--batch-sizes: must be at least 2, got {min(args.batch_sizes)}")
    device = torch.device(args.device)
    problem = Problem(args.extractor, args.image_size, args.generator)
    rows = memory_rows(problem, sorted(set(args.batch_sizes)), limit, device)
    scales = scale_rows(rows)
    capacities = [] if args.no_capacity else capacity_rows(CAPACITY_PROBLEMS, [n * GIB for n in BUDGETS])
    saved = [saved_row(problem, dtype, device) for dtype in (None, torch.bfloat16)]
    print_rows(rows, scales, saved, capacities)
    if args.json is not None:
        write_json(args.json, [*rows, *scales, *saved, *capacities])
    if args.plot is not None:
        plot(args.plot, rows)


if __name__ == "__main__":
    run_command(main)
