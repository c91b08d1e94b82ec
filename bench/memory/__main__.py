"""The command line; see the package."""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import dataclasses
import json
from collections.abc import Sequence

import torch

import bench.memory
from bench.memory.measuring import capacity_rows, measure_given, memory_rows, saved_row, scale_rows
from bench.memory.printing import capacity_table, plot
from bench.memory.rows import BUDGETS, CAPACITY_PROBLEMS, GIB, METHODS, VARIANTS, CapacityRow, SavedRow, ScaleRow
from bench.rows import Row, RowFile, print_rows
from bench.scenario import Problem
from engine.configuration.command import Parser, check_two_files, output_file, run_command
from engine.configuration.groups import memory_bytes
from engine.configuration.inputs import choose_device
from engine.support.errors import require

# What the model leaves out: workspaces of libraries, and what the allocator rounds up.
_OF_FREE_MEMORY = 0.8


def parser() -> Parser:
    """The flags of `python -m bench.memory`."""
    arguments = Parser(
        prog="python -m bench.memory",
        description=bench.memory.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add("--extractor", default="vgg19+resnet18", metavar="NAME")
    add("--image-size", type=int, default=32, metavar="PIXELS")
    add("--generator", choices=("dcgan", "resnet"), default="dcgan")
    add("--batch-sizes", type=int, nargs="+", metavar="N",
        help="minibatches (default: 16 64 256 1024 4096 16384; 4096 with --methods)")  # fmt: skip
    which = arguments.add_mutually_exclusive_group()
    which.add_argument("--variants", nargs="+", choices=[variant.name for variant in VARIANTS], metavar="NAME",
        help=f"of these alone: {', '.join(repr(variant.name) for variant in VARIANTS)}")  # fmt: skip
    which.add_argument("--methods", nargs="*", choices=[variant.name for variant in METHODS], metavar="NAME",
        help="instead: methods on pooled features in chunks, all or of these alone: "
             f"{', '.join(repr(variant.name) for variant in METHODS)}")  # fmt: skip
    add("--whole", action="store_true", help="with --methods: every chunk, and not the first three alone")
    add("--measure-up-to", default="12GiB", metavar="SIZE",
        help="measure where the model says at most this, weights included, and 80%% of a GPU's free memory "
             "(default: %(default)s)")  # fmt: skip
    add("--no-capacity", action="store_true", help="leave out the largest minibatches that fit 12, 16, 24 and 80 GiB")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=output_file, metavar="FILE", help="write the rows there too")
    add("--plot", type=output_file, metavar="FILE", help="draw peak against minibatch")
    add("--one", help=argparse.SUPPRESS)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write what --json and --plot ask for, print the tables."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.one is not None:
        print(json.dumps(measure_given(args.one)))
        return
    check_two_files(args, "json", "plot")
    if args.whole and args.methods is None:
        arguments.error("--whole: is of --methods, which work in chunks")
    if args.no_capacity and args.methods is not None:
        arguments.error("--no-capacity: --methods has no such table; leave it out")
    if args.plot is not None:
        require("matplotlib", "--plot")
    limit = memory_bytes(args.measure_up_to, "measure_up_to")
    sizes = sorted(set(args.batch_sizes or ([4096] if args.methods is not None else [4**n for n in range(2, 8)])))
    if min(sizes) < 2:
        arguments.error(f"--batch-sizes: must be at least 2, got {min(sizes)}")
    device = choose_device(args.device)
    if device.type == "cuda":  # a minibatch that doesn't fit would end the benchmark
        limit = min(limit, int(_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]))
    problem = Problem(args.extractor, args.image_size, args.generator)
    named = args.methods or args.variants
    offered = VARIANTS if args.methods is None else METHODS
    variants = [variant for variant in offered if not named or variant.name in named]
    if args.whole:
        variants = [dataclasses.replace(variant, chunks=None) for variant in variants]
    scales: Sequence[ScaleRow] = ()
    saved: Sequence[SavedRow] = ()
    capacities: Sequence[CapacityRow] = ()
    with RowFile(args.json) as file:
        rows = file.keep(memory_rows(problem, sizes, limit, device, variants))
        if args.methods is None:
            scales = file.keep(scale_rows(rows))
            saved = file.keep(saved_row(problem, dtype, device) for dtype in (None, torch.bfloat16))
        if args.methods is None and not args.no_capacity:
            capacities = file.keep(capacity_rows(CAPACITY_PROBLEMS, [n * GIB for n in BUDGETS], variants))
    if args.plot is not None:
        plot(args.plot, rows)
    print_rows(rows)
    others: Sequence[Row]
    for others in (scales, saved):
        if others:
            print()
            print_rows(others)
    if capacities:
        print()
        print(capacity_table(capacities))


if __name__ == "__main__":
    run_command(main)
