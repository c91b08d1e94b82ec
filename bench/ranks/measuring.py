"""Jobs that are compared, and the rows that come of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.ranks.jobs import Job
from bench.ranks.rows import AloneRow, BytesRow, EqualityRow, TimeRow
from bench.ranks.tasks import CASES, MINIBATCH, STEPS
from bench.rows import environment, interleaved, percentiles
from bench.scenario import Problem

# (ranks, threads of each) that take turns, in all two threads.
JOBS = ((1, 2), (2, 1))


def equality_rows(problem: Problem, ranks: Sequence[int]) -> Iterator[EqualityRow]:
    """Every method on every number of ranks, each a job of its own, against one process."""
    options = {"extractor": problem.extractor, "image_size": problem.image_size}
    where = environment() | {"threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        found: dict[tuple[str, str, int], list[dict[str, Tensor]]] = {}
        for size in sorted({1, *ranks}):
            with Job(size, 1, "equality", **options) as job:
                for method, averager in CASES:
                    files = job.ask([method, averager, folder])
                    found[method, averager, size] = [torch.load(file) for file in files]
        for method, averager in CASES:
            (alone,) = found[method, averager, 1]
            for size in ranks:
                worst = differences(alone, found[method, averager, size])
                yield EqualityRow(
                    method=method, averager=averager, ranks=size, minibatch=MINIBATCH, steps=STEPS,
                    gradient=worst["gradient"], loss=worst["loss"], state=worst.get("state"),
                    trained=worst["trained"], environment=where,
                )  # fmt: skip


def differences(alone: Mapping[str, Tensor], ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The largest ‖difference‖/‖value‖ by what stands before a name's first dot; counters, and zeros, must be equal.

    RuntimeError if ranks have other tensors than one process has, or differ where nothing is rounded.
    """
    worst: dict[str, float] = {}
    for own in ranks:
        if own.keys() != alone.keys():
            raise RuntimeError(f"ranks have {', '.join(own.keys() ^ alone.keys())} more or less than one process")
        for name, value in alone.items():
            size = float(value.double().norm())
            difference = float((own[name].double() - value.double()).norm())
            if difference and (not value.is_floating_point() or size == 0):
                raise RuntimeError(f"{name} of ranks is not that of one process")
            if value.is_floating_point():
                kind = name.split(".")[0]
                worst[kind] = max(worst.get(kind, 0.0), difference / size if size else 0.0)
    return worst


def bytes_rows(problem: Problem, minibatch: int, ranks: Sequence[int]) -> Iterator[BytesRow]:
    """What the first rank of every job hands over in a step."""
    where = environment() | {"threads": 1}
    for size in ranks:
        with Job(size, 1, "traffic", **_options(problem, minibatch)) as job:
            first, *_ = job.ask()
        for what, (calls, counted, formula) in first.items():
            yield BytesRow(
                extractor=problem.extractor, image_size=problem.image_size, minibatch=minibatch, ranks=size, what=what,
                calls=calls, counted=counted, formula=formula, environment=where,
            )  # fmt: skip


def time_rows(problem: Problem, minibatch: int, repetitions: int) -> Iterator[TimeRow | AloneRow]:
    """Steps of both jobs, which take turns, and what calls of `Ranks` take of a step of the first."""
    jobs = [Job(size, threads, "times", **_options(problem, minibatch)) for size, threads in JOBS]
    with jobs[0], jobs[1]:
        calls = {(job.size, job.threads): job for job in jobs}
        steps = {name: (lambda job=job: max(job.ask("step"))) for name, job in calls.items()}
        taken: Mapping[tuple[int, int], list[Any]] = interleaved(steps, repetitions, lambda step: step(), warmup=2)
        (alone,) = jobs[0].ask("alone")
    shared = _options(problem, minibatch)
    where, rows = environment(), []
    for (size, threads), seconds in taken.items():
        p20, p50, p80 = percentiles(seconds)
        rows.append(TimeRow(
            **shared, dtype="float32", ranks=size, threads=threads, seconds=seconds, p20=p20, p50=p50, p80=p80,
            environment={**where, "threads": threads},
        ))  # fmt: skip
    yield from rows
    yield AloneRow(
        **shared, calls=alone[0], call_seconds=alone[1], step_seconds=rows[0].p50,
        environment={**where, "threads": rows[0].threads},
    )  # fmt: skip


def _options(problem: Problem, minibatch: int) -> dict[str, Any]:
    return {"extractor": problem.extractor, "image_size": problem.image_size, "minibatch": minibatch}
