"""What the processes of a `bench.ranks.jobs.Job` do: `python -m bench.ranks.tasks TASK OPTIONS`.

A task makes ready and returns a function that answers questions; both run on every rank.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.ranks.traffic import expected, watched
from bench.scenario import Problem, Scenario, engine_step, smooth_images
from engine.comparison.averagers import AMA, Averager, MovingAverage, NoAverage
from engine.comparison.distances import kernels
from engine.comparison.distances.mean_embedding import MMD
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.on_features import OnFeatures
from engine.comparison.pooling import POOLS
from engine.generation.networks import build_generator
from engine.generation.priors import Gaussian, Noise
from engine.methods.matching import Matching
from engine.representation.extractor import Extractor
from engine.representation.protocols import Objective
from engine.training.ranks import Ranks

STEPS, MINIBATCH = 10, 7
AVERAGERS: Mapping[str, Callable[[], Averager]] = {
    "ama": lambda: AMA(lr=1e-2),
    "ma": lambda: MovingAverage(alpha=0.2),
    "none": NoAverage,
}
CASES = (*(("gfmn", name) for name in AVERAGERS), ("mmd", ""))
_NZ, _REAL, _CHUNK = 16, 16, 2
_TIMED = 0.02  # seconds that each call of `Ranks` is repeated for

Answer = Callable[[Any], Any]


class _Double(Gaussian):
    """Gaussian z in float64."""

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        return super().sample(count, random).double()


def _objective(method: str, averager: str, extractor: Extractor, ranks: Ranks) -> Objective:
    torch.manual_seed(3)
    features = extractor.features(smooth_images(_REAL, extractor.image_size).double())
    if method == "gfmn":
        target = Moments.of(features)
        return MomentMatching(extractor, target, AVERAGERS[averager](), kernels="reference", ranks=ranks)
    pool, parts = POOLS["mean"], features.split([tap.num_features for tap in extractor.taps], dim=1)
    taps = zip(parts, extractor.taps, strict=True)
    real = torch.cat([pool(part.unflatten(1, tap.shape)) for part, tap in taps], dim=1)
    distance = MMD(real, kernels.rational_quadratic())
    return OnFeatures(extractor, distance, chunk_size=_CHUNK, kernels="reference", ranks=ranks)


def equality(ranks: Ranks, threads: int, extractor: str, image_size: int) -> Answer:
    """Answers a case with the file that holds what a training of `STEPS` steps has come to."""
    network = Scenario.calibrated(Problem(extractor, image_size), "cpu").extractor.double()

    def answer(question: list[str]) -> str:
        method, averager, folder = question
        objective = _objective(method, averager, network, ranks)
        torch.manual_seed(1)
        generator = build_generator("dcgan", image_size=image_size, nz=_NZ).double()
        matching = Matching(generator, _Double(_NZ), objective, batch_size=MINIBATCH, lr=1e-3, ranks=ranks)
        noise = Noise(11)
        found = {"loss": matching.step(None, noise)["loss"].clone()}
        found |= {f"gradient.{name}": w.grad.clone() for name, w in generator.named_parameters() if w.grad is not None}
        found |= {f"state.{name}": value.clone() for name, value in matching.state_dict().items()}
        for _ in range(STEPS - 1):
            matching.step(None, noise)
        found |= {f"trained.{name}": value for name, value in generator.state_dict().items()}
        path = Path(folder) / f"{method}-{averager}-{ranks.size}-{ranks.rank}.pt"
        torch.save(found, path)
        return str(path)

    return answer


def traffic(ranks: Ranks, threads: int, extractor: str, image_size: int, minibatch: int) -> Answer:
    """Answers with the collectives of a training step: kind → (calls, bytes, bytes by the formula)."""
    parts = Scenario.shapes(Problem(extractor, image_size)).parts(minibatch, ranks=ranks, kernels="reference")
    step = engine_step(parts)
    step()  # what is only exchanged once

    def answer(_: Any) -> dict[str, tuple[int, int, int]]:
        with watched() as exchanges:
            step()
        formula = expected(parts.objective.extractor.num_features, parts.generator, ranks.size)
        calls, sizes = Counter(entry.what for entry in exchanges), Counter[str]()
        for entry in exchanges:
            sizes[entry.what] += entry.size
        return {what: (calls[what], sizes[what], formula.get(what, 0)) for what in {**formula, **calls}}

    return answer


def times(ranks: Ranks, threads: int, extractor: str, image_size: int, minibatch: int) -> Answer:
    """Answers "step" with the seconds of a training step, "alone" with what calls of `Ranks` take of one."""
    parts = Scenario.shapes(Problem(extractor, image_size)).parts(minibatch, ranks=ranks)
    step = engine_step(parts)

    def answer(question: str) -> Any:
        if question == "alone":
            return calls_of(ranks, step)
        begun = time.perf_counter()
        step()
        return time.perf_counter() - begun

    return answer


def calls_of(ranks: Ranks, step: Callable[[], object]) -> tuple[dict[str, int], float]:
    """How often `step` calls which method of `ranks`, and the seconds that all these calls take, each timed alone.

    One that is called by another of them is part of that one. `counts`, which the trainer's loop calls between two
    steps, is one call more.
    """
    calls: list[tuple[str, Callable[[], object]]] = []
    methods = {name: method for name, method in inspect.getmembers(ranks, inspect.ismethod) if name[0] != "_"}
    inside = False

    def recording(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:
                return method(*args, **options)
            calls.append((name, lambda: method(*args, **options)))
            inside = True
            try:
                return method(*args, **options)
            finally:
                inside = False

        return call

    for name, method in methods.items():
        setattr(ranks, name, recording(name, method))
    try:
        step()
        ranks.counts(0)
    finally:
        for name in methods:
            delattr(ranks, name)
    return dict(Counter(name for name, _ in calls)), sum(_seconds(call) for _, call in calls)


def _seconds(call: Callable[[], object]) -> float:
    count, begun = 0, time.perf_counter()
    while (taken := time.perf_counter() - begun) < _TIMED:
        call()
        count += 1
    return taken / count


TASKS: Mapping[str, Callable[..., Answer]] = {"equality": equality, "traffic": traffic, "times": times}


def main(task: str, options: str) -> None:
    """Answer every line of standard input."""
    given = json.loads(options)
    torch.set_num_threads(given["threads"])
    ranks = Ranks.join()
    answer = TASKS[task](ranks, **given)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
    ranks.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
