"""`python -m bench.method_steps`: steps of every method, beside GFMN's with the same two forward passes.

A minibatch of 256 images in chunks of 64: every method runs the extractor forward twice and backward once, and on the
same generator. What differs is the criterion: moments and the averager, or a distance of channel means to random
features of real images. All methods take turns in another order every time.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.cuda import cuda_of, step_time
from bench.rows import Row, RowFile, environment, percentiles, print_rows, rounds
from bench.scenario import Problem, Scenario, engine_step
from engine.configuration.command import Parser, output_file, run_command
from engine.configuration.inputs import choose_device

METHODS: Mapping[str, tuple[str, int | None]] = {
    "gfmn": ("gfmn", None),
    "mmd, 10,000 real images": ("mmd", 10_000),
    "mmd, 2,000 landmarks": ("mmd", 2_000),
    "frechet, 1,797 real images": ("frechet", 1_797),
    "frechet, any number of real images": ("frechet", None),
    "drifting, 2,000 real images": ("drifting", 2_000),
    "sinkhorn, 2,000 real images": ("sinkhorn", 2_000),
}
"""Name of the row → method, and real images that it knows; None for as many as can matter. GFMN is the first."""


@dataclass(frozen=True, kw_only=True)
class MethodStepRow(Row):
    """One method's training step.

    Attributes:
        name: of the row.
        extractor, image_size, minibatch, chunk: what was trained, and how.
        p20, p50, p80: seconds a step; on CUDA of the device, see `bench.cuda.StepTime`.
        relative: median over rounds of the step's time divided by that of GFMN's step in the same round.
    """

    name: str
    extractor: str
    image_size: int
    minibatch: int
    chunk: int
    p20: float
    p50: float
    p80: float
    relative: float

    def cells(self) -> dict[str, object]:
        """Seconds, and the ratio."""
        times = {f"p{share}": f"{value:.3f}" for share, value in ((20, self.p20), (50, self.p50), (80, self.p80))}
        return {"method": self.name, **times, "/ gfmn": f"{self.relative:.3f}"}


def measure_methods(
    problem: Problem, minibatch: int, chunk: int, device: str, repetitions: int, names: Sequence[str] = tuple(METHODS)
) -> Iterator[list[MethodStepRow]]:
    """The rows so far, after every round; `names` are of METHODS, "gfmn" among them."""
    scenario = Scenario.calibrated(problem, device)
    steps = {}
    for name in names:
        method, images = METHODS[name]
        flags: dict[str, Any] = {} if method == "gfmn" else {"method": method, "pool": "mean"}
        steps[name] = engine_step(scenario.parts(minibatch, images=images, chunk_size=chunk, **flags))
    for found in rounds(steps, repetitions, partial(step_time, cuda=cuda_of(device)), warmup=1):
        times = {name: [taken.seconds for taken in taken_times] for name, taken_times in found.items()}
        yield [
            _row(name, own, times["gfmn"], problem, minibatch, chunk, device) for name, own in times.items()
        ]  # fmt: skip


def _row(
    name: str, own: Sequence[float], gfmn: Sequence[float], problem: Problem, minibatch: int, chunk: int, device: str
) -> MethodStepRow:
    p20, p50, p80 = percentiles(own)
    _, relative, _ = percentiles([mine / other for mine, other in zip(own, gfmn, strict=True)])
    return MethodStepRow(
        name=name, extractor=problem.extractor, image_size=problem.image_size, minibatch=minibatch, chunk=chunk,
        p20=p20, p50=p50, p80=p80, relative=relative, environment=environment(device),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = Parser(
        prog="python -m bench.method_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--extractor", default="vgg19+resnet18", metavar="NAME")
    add("--image-size", type=int, default=32, metavar="PIXELS")
    add("--batch-size", type=int, default=256, metavar="N")
    add("--chunk-size", type=int, default=64, metavar="N", help="smaller than the minibatch (default: %(default)s)")
    add("--only", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), metavar="NAME", help="beside gfmn")
    add("--repetitions", type=int, default=10, metavar="N", help="timed steps (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=output_file, metavar="FILE", help="write the rows there too")
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        parser.error(f"--repetitions: must be at least 1, got {args.repetitions}")
    if not 1 <= args.chunk_size < args.batch_size:
        parser.error(f"--chunk-size: must be from 1 to {args.batch_size - 1}, got {args.chunk_size}")
    choose_device(args.device)  # refuses what is not there
    names = [name for name in METHODS if name == "gfmn" or name in args.only]
    problem = Problem(args.extractor, args.image_size)
    measured = measure_methods(problem, args.batch_size, args.chunk_size, args.device, args.repetitions, names)
    with RowFile(args.json) as file:
        rows = file.keep_latest(measured)
    print_rows(rows)


if __name__ == "__main__":
    run_command(main)
