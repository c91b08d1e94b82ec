"""Memory of a training step, modelled and measured, and what follows from it: slopes and largest minibatches."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.memory.rows import METHODS, VARIANTS, CapacityRow, MemoryRow, SavedRow, ScaleRow, Variant, shown
from bench.rows import environment, peak_memory
from bench.scenario import Problem, Scenario, Step, engine_step, plain_step
from engine.representation.feature_pass import Activate, Chunk, FeaturePass
from engine.training.planner import Footprint

Measured = tuple[int, int, int | None]
"""Bytes: the allocator's peak beyond the weights; the largest resident size; the one before."""
# What is said to fit is said with an error of at most this share, on the safe side.
_PRECISION = 0.005


@functools.lru_cache(maxsize=4)
def _on_cpu(problem: Problem, naive: bool) -> Scenario:
    return Scenario.shapes(problem, naive=naive)


def model(variant: Variant, problem: Problem, minibatch: int) -> Footprint:
    """What a step needs, without allocating it."""
    scenario = _on_cpu(problem, variant.naive is not None)
    if variant.naive is not None:
        return scenario.modelled_naive(minibatch, **variant.naive)
    return scenario.modelled(minibatch, variant.precision, images=variant.images, **variant.flags)


def measure_peak(variant: Variant, problem: Problem, minibatch: int, device: torch.device) -> Measured:
    """See `Measured`. In this process: call it once."""
    scenario = Scenario.shapes(problem, device, naive=variant.naive is not None)
    generator = scenario.generator()

    def make_step(images: int) -> Step:
        if variant.naive is not None:
            return plain_step(generator, scenario.naive(copied=False, **variant.naive), images, variant.precision)
        parts = scenario.parts(
            images, variant.precision, generator=generator, images=variant.images, max_chunks=variant.chunks,
            **variant.flags,
        )  # fmt: skip
        return engine_step(parts)

    def two_steps(images: int) -> None:
        step = make_step(images)
        step()
        step()

    two_steps(2)  # compiles
    for module in (generator, nn.ModuleList(scenario.networks), scenario.extractor):
        module.zero_grad(set_to_none=True)
    gc.collect()
    baseline = resident_size()
    peak = peak_memory(lambda: two_steps(minibatch), device)
    unit = 1 if sys.platform == "darwin" else 1024
    return peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, baseline


def resident_size() -> int | None:
    """Bytes of this process in RAM now; None where the system has no /proc."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() if pages.exists() else None


def measure_apart(variant: Variant, problem: Problem, minibatch: int, device: torch.device) -> Measured:
    """`measure_peak` in a process of its own; RuntimeError with its last line if that fails."""
    given = [
        variant.name,
        variant.chunks,
        problem.extractor,
        problem.image_size,
        problem.generator,
        minibatch,
        str(device),
    ]
    command = [sys.executable, "-m", "bench.memory", "--one", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{variant.name}, minibatch {minibatch}: not measured: {reason}")
    peak, resident, baseline = json.loads(done.stdout.strip().splitlines()[-1])
    return peak, resident, baseline


def measure_given(text: str) -> Measured:
    """`measure_peak` of what `measure_apart` wrote on the command line."""
    name, chunks, extractor, size, generator, minibatch, device = json.loads(text)
    (variant,) = (variant for variant in (*VARIANTS, *METHODS) if variant.name == name)
    variant = dataclasses.replace(variant, chunks=chunks)
    return measure_peak(variant, Problem(extractor, size, generator), minibatch, torch.device(device))


def memory_rows(
    problem: Problem,
    minibatches: Sequence[int],
    measure_up_to: int,
    device: torch.device,
    variants: Sequence[Variant] = VARIANTS,
) -> Iterator[MemoryRow]:
    """Every variant at every minibatch; measured where `measure_up_to` bytes are enough."""
    where = environment(device)
    for variant in variants:
        for minibatch in minibatches:
            footprint = model(variant, problem, minibatch)
            measured: tuple[int | None, int | None, int | None] = (None, None, None)
            if footprint.total <= measure_up_to:
                measured = measure_apart(variant, problem, minibatch, device)
            print(f"{variant.name}, minibatch {minibatch}: {shown(footprint.peak)} modelled, "
                  f"{shown(measured[0])} measured", file=sys.stderr)  # fmt: skip
            yield MemoryRow(
                variant.name, variant.dtype, problem.extractor, problem.generator, problem.image_size, minibatch,
                footprint.weights, footprint.peak, *measured, variant.chunks, environment=where,
            )  # fmt: skip


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
                measured[-1] if measured else None, environment=row.environment,
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
) -> Iterator[CapacityRow]:
    """The largest minibatch of every variant for every problem and budget (bytes)."""
    where = environment()
    for problem in problems:
        for variant in variants:
            total = functools.cache(lambda n, v=variant, p=problem: model(v, p, n).total)
            for budget in budgets:
                largest = largest_minibatch(total, budget)
                print(f"{variant.name}, {problem.extractor} at {problem.image_size}: {largest} in {shown(budget)}",
                      file=sys.stderr)  # fmt: skip
                yield CapacityRow(
                    variant.name, variant.dtype, problem.extractor, problem.generator, problem.image_size, budget,
                    largest, environment=where,
                )  # fmt: skip


def saved_row(problem: Problem, dtype: torch.dtype | None, device: torch.device) -> SavedRow:
    """Every storage in what the pass keeps, once, as the difference between minibatches of 4 and 2."""
    scenario = Scenario.shapes(problem, device)
    feature_pass = FeaturePass(scenario.extractor, dtype=dtype)

    def saved(minibatch: int) -> int:
        size = problem.image_size
        images = torch.rand(minibatch, 3, size, size, device=device)
        kept = feature_pass.keep(images, Chunk(slice(0, minibatch), Activate()))
        storages = [x.untyped_storage() for x in tree_leaves(kept) if isinstance(x, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    low = dtype or torch.float32
    name = str(low).removeprefix("torch.")
    floor = scenario.extractor.num_features * low.itemsize
    kept = (saved(4) - saved(2)) // 2
    return SavedRow(problem.extractor, problem.image_size, name, kept, floor, environment=environment(device))
