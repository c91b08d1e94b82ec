"""The command line; see the package."""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial

import torch

import bench.kernels
from bench.kernels.audit import MULTIPROCESSORS, audit, print_audit
from bench.kernels.steps import measure_steps
from bench.kernels.times import OPERATIONS, measure_operations
from bench.kernels.traffic import count_bytes, print_bytes
from bench.kernels.workloads import EXTRACTOR, IMAGE_SIZE, taps_of
from bench.rows import RowFile, print_rows
from engine.configuration.command import Parser, output_file, run_command
from engine.configuration.inputs import choose_device

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TARGETS = {f"sm_{capability}": capability for capability in MULTIPROCESSORS}


def parser() -> Parser:
    """The flags of `python -m bench.kernels`."""
    arguments = Parser(
        prog="python -m bench.kernels", description=bench.kernels.__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    what = arguments.add_mutually_exclusive_group()
    what.add_argument("--audit", action="store_true", help="compile ahead of time, read the machine code")
    what.add_argument("--bytes", action="store_true", help="count what the kernels load and store")
    what.add_argument("--step", action="store_true", help="time whole training steps")
    arguments.add_argument("--repetitions", type=int, default=30, help="of every timed call (default: %(default)s)")
    arguments.add_argument(
        "--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES), help="of the timed taps (default: both)"
    )
    arguments.add_argument(
        "--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="that are timed (default: all)"
    )
    arguments.add_argument(
        "--targets", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS), help="of --audit (default: all)"
    )
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--json", type=output_file, metavar="FILE", help="write the rows there too")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, count or audit; write, print. Exits with 1 after an audit that found a violation."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.repetitions < 1:
        arguments.error(f"--repetitions: must be at least 1, got {args.repetitions}")
    choose_device(args.device)  # refuses what is not there
    if args.bytes and os.environ.get("TRITON_INTERPRET") != "1":  # Triton has already been imported, without it
        command = [sys.executable, "-m", "bench.kernels", *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    failed = False
    show: Callable[[], None]
    with RowFile(args.json) as file:
        if args.audit:
            audited = file.keep(audit([TARGETS[name] for name in dict.fromkeys(args.targets)]))
            show = partial(print_audit, audited)
            failed = any(row.violations for row in audited)
        elif args.bytes:
            show = partial(print_bytes, file.keep(count_bytes(taps_of(EXTRACTOR, IMAGE_SIZE), torch.bfloat16)))
        elif args.step:
            show = partial(print_rows, file.keep(measure_steps(args.device, args.repetitions)))
        else:
            dtypes = [DTYPES[name] for name in args.dtypes]
            timed = measure_operations(args.device, args.repetitions, dtypes, args.operations)
            show = partial(print_rows, file.keep(timed))
    show()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
