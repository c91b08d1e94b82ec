"""Games, penalties and distances on one number and in the plane: small figures with their rows, in minutes.

python -m bench.toy                          # all parts, into docs/toys/ and bench/results/
python -m bench.toy --only dirac distances

`python -m bench.pages` writes the rows into docs/toys.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import torch

from bench.rows import Row, write_json
from bench.toy import dirac, distances, figures, learners, witness
from bench.toy.planes import PLANES
from engine.configuration.command import Parser, run_command
from engine.support.errors import InputError

ROOT = Path(__file__).parents[2]
Part = Callable[["Workshop"], Sequence[Row]]


class Workshop:
    """What parts run with.

    Args:
        figures: the folder of the pictures.
        steps: in place of each part's own; None for those.
        pool: of processes; None for this one alone.
    """

    def __init__(self, figures: Path, steps: int | None = None, pool: Executor | None = None):
        self.figures, self.steps, self.pool = figures, steps, pool

    def results(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        """`function` of each tuple of arguments, in their order."""
        if self.pool is None:
            return list(starmap(function, arguments))
        return [future.result() for future in [self.pool.submit(function, *given) for given in arguments]]


def of_dirac(workshop: Workshop) -> Sequence[Row]:
    """Trajectories of every game with everything that may tame it."""
    cases = [(*case, workshop.steps or steps) for *case, steps in dirac.cases()]
    found = workshop.results(dirac.measure, cases)
    figures.save(workshop.figures / "dirac.png", figures.dirac(found))
    return [row for row, _ in found]


def of_distances(workshop: Workshop) -> Sequence[Row]:
    """Distances of point masses and of Gaussians."""
    points = distances.point_rows()
    figures.save(workshop.figures / "distances.png", figures.distances(points, distances.point_curves()))
    return [*points, *distances.gaussian_rows()]


def of_witness(workshop: Workshop) -> Sequence[Row]:
    """MMD's witness and its gradient under three critics."""
    steps = witness.STEPS if workshop.steps is None else (1, workshop.steps)
    found = workshop.results(witness.measure, [(name, steps) for name in witness.KEPT])
    pictures = [[picture for _, picture in pairs] for pairs in found]
    figures.save(workshop.figures / "witness.png", figures.witnesses(pictures))
    return [row for pairs in found for row, _ in pairs]


def of_learners(law: str, workshop: Workshop) -> Sequence[Row]:
    """Every method on one law."""
    cases = [(law, name, workshop.steps) for name in learners.LEARNERS]
    found = [learners.truth(law), *workshop.results(learners.measure, cases)]
    drawn = [(row.name, points) for row, points in found]
    figures.save(workshop.figures / f"{law}.png", figures.scatters(PLANES[law](), drawn))
    return [row for row, _ in found]


PARTS: dict[str, Part] = {
    "dirac": of_dirac,
    "distances": of_distances,
    "witness": of_witness,
    **{law: partial(of_learners, law) for law in PLANES},
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = Parser(
        prog="python -m bench.toy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), metavar="NAME", help="some of the parts")
    add("--figures", type=Path, metavar="DIR", default=ROOT / "docs/toys", help="of the pictures")
    add("--results", type=Path, metavar="DIR", default=ROOT / "bench/results", help="a file of rows for each part")
    add("--steps", type=int, metavar="N", help="in place of each part's, to try the command")
    arguments = parser.parse_args(argv)
    if arguments.steps is not None and arguments.steps < 6:
        raise InputError("steps", f"must be at least 6, got {arguments.steps}")
    # One thread each: the networks are too small for more.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        workshop = Workshop(arguments.figures, arguments.steps, pool)
        for name in arguments.only:
            rows = PARTS[name](workshop)
            file = arguments.results / f"toys_{name}_{time.strftime('%Y-%m-%d')}.json"
            write_json(file, rows)
            print(f"{name}: {len(rows)} rows in {file}", flush=True)


if __name__ == "__main__":
    run_command(main)
