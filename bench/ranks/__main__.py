"""The command line; see the package."""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
from collections.abc import Sequence

import bench.ranks
from bench.ranks.measuring import bytes_rows, equality_rows, time_rows
from bench.ranks.model import Machine, Work, model_rows
from bench.ranks.rows import ModelRow, TimeRow
from bench.rows import Row, RowFile, print_rows
from bench.scenario import NZ, Problem
from engine.configuration.command import Parser, output_file, run_command
from engine.generation.networks import build_generator
from engine.representation.build import build_extractor

PARTS = ("equality", "bytes", "times", "model")
# Small enough for float64, on ranks that share two processors.
EQUALITY = Problem("vgg-small", 32)
RANKS = (1, 2, 4, 8, 16, 32, 64)


def parser() -> Parser:
    """The flags of `python -m bench.ranks`."""
    arguments = Parser(
        prog="python -m bench.ranks", description=bench.ranks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = arguments.add_argument
    add("--only", choices=PARTS, nargs="+", default=PARTS, metavar="TABLE",
        help=f"of these alone: {', '.join(PARTS)}")  # fmt: skip
    add("--extractor", default="vgg19+resnet18", metavar="NAME", help="of bytes, times and model")
    add("--image-size", type=int, default=32, metavar="PIXELS")
    add("--batch-size", type=int, default=64, metavar="N", help="minibatch of bytes and times (default: %(default)s)")
    add("--repetitions", type=int, default=20, metavar="N", help="timed steps of each job (default: %(default)s)")
    add("--step-ms", type=float, default=1.4, metavar="MS",
        help="of the model: kernels of a step of 64 images on one GPU, without what is fixed (default: %(default)s, "
             "assumed)")  # fmt: skip
    add("--model-batch-sizes", type=int, nargs="+", default=[64, 1024], metavar="N",
        help="of the model: minibatches that stay, or grow with the ranks (default: 64 1024)")  # fmt: skip
    add("--json", type=output_file, metavar="FILE", help="write the rows there too")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and model, write what --json asks for, print the tables."""
    arguments = parser()
    args = arguments.parse_args(argv)
    for name, least in (("batch_size", 4), ("repetitions", 1)):
        if getattr(args, name) < least:
            arguments.error(f"--{name.replace('_', '-')}: must be at least {least}, got {getattr(args, name)}")
    if min(args.model_batch_sizes) < 2:
        arguments.error(f"--model-batch-sizes: must be at least 2, got {min(args.model_batch_sizes)}")
    if not args.step_ms > 0:
        arguments.error(f"--step-ms: must be more than 0, got {args.step_ms:g}")
    problem = Problem(args.extractor, args.image_size)
    with RowFile(args.json) as file:
        if "equality" in args.only:
            _print(file.keep(equality_rows(EQUALITY, (2, 3))))
        if "bytes" in args.only:
            _print(file.keep(bytes_rows(problem, args.batch_size, (2, 4))))
        if "times" in args.only:
            rows = file.keep(time_rows(problem, args.batch_size, args.repetitions))
            one, two = (row for row in rows if isinstance(row, TimeRow))
            _print([one, two])
            print(f"2 ranks of 1 thread / 1 rank of 2 threads, medians: {two.p50 / one.p50:.3f}\n")
            _print(rows[2:])
        if "model" in args.only:
            _print(file.keep(_modelled(problem, args.step_ms / 1e3 / 64, args.model_batch_sizes)))


def _modelled(problem: Problem, image_seconds: float, minibatches: Sequence[int]) -> list[ModelRow]:
    extractor = build_extractor(problem.extractor, image_size=problem.image_size)
    generator = build_generator(problem.generator, image_size=problem.image_size, nz=NZ)
    work = Work.of(extractor.num_features, generator)
    return list(model_rows(Machine(image_seconds), work, minibatches, RANKS))


def _print(rows: Sequence[Row]) -> None:
    print_rows(rows)
    print()


if __name__ == "__main__":
    run_command(main)
