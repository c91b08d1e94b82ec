"""`python -m bench.step_profile`: what a training step on a CUDA device consists of, and how long the device is idle.

For every minibatch: how many kernels a step runs, for how long the device is busy with them, how long the step takes,
and how long the host needs to hand it over. Biases and changes of layout that are kernels of their own are counted,
because a step should have none.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench.cuda import Cuda, Kernel, busy_seconds, kernels_of, step_time
from bench.rows import Row, RowFile, environment, print_rows
from bench.scenario import DTYPE_NAMES, Problem, Scenario, engine_step
from engine.configuration.command import Parser, output_file, run_command
from engine.configuration.inputs import choose_device

# Of the names that cuDNN and PyTorch give their kernels.
_LAYOUT = re.compile(r"nchwToNhwc|nhwcToNchw", re.IGNORECASE)
_BIAS = re.compile(r"CUDAFunctor_add|add_bias|AddBias")
# Compiling, and the eager steps before a graph is captured.
_WARMUP, _REPETITIONS = 5, 5


@dataclass(frozen=True)
class ProfileRow(Row):
    """One training step of the engine.

    Attributes:
        kernels: that a step runs, copies and fills of memory among them.
        layout_kernels: of them, changes between NCHW and NHWC.
        add_kernels: of them, plain sums of two tensors: biases, if no shortcut is added so.
        step: median seconds a step, `bench.cuda.STEPS` un-synchronised ones between two events.
        host: median seconds until the host has handed one over.
        busy: seconds of a step in which at least one kernel runs.
        longest: kernels that take most time in all, with that time in seconds.
    """

    extractor: str
    image_size: int
    minibatch: int
    dtype: str
    kernels: int
    layout_kernels: int
    add_kernels: int
    step: float
    host: float
    busy: float
    longest: tuple[tuple[str, float], ...]

    @property
    def idle(self) -> float:
        """Share of a step in which no kernel runs. The two are of different steps: never less than 0."""
        return max(0.0, 1 - self.busy / self.step)

    def cells(self) -> dict[str, object]:
        """Counts, milliseconds, and the idle share in percent."""
        return {
            "minibatch": self.minibatch,
            "dtype": self.dtype,
            "kernels": self.kernels,
            "of layout": self.layout_kernels,
            "of sums": self.add_kernels,
            "step, ms": f"{1e3 * self.step:.2f}",
            "host, ms": f"{1e3 * self.host:.2f}",
            "busy, ms": f"{1e3 * self.busy:.2f}",
            "idle": f"{self.idle:.0%}",
        }


def profile_row(
    problem: Problem, minibatch: int, dtype: torch.dtype | None, step: Callable[[], object], cuda: Cuda
) -> ProfileRow:
    """Time `step` untraced, then trace one."""
    times = [step_time(step, cuda) for _ in range(_REPETITIONS)]
    kernels = kernels_of(cuda.events(step))
    return ProfileRow(
        problem.extractor, problem.image_size, minibatch, DTYPE_NAMES[dtype], len(kernels),
        sum(_LAYOUT.search(kernel.name) is not None for kernel in kernels),
        sum(_BIAS.search(kernel.name) is not None for kernel in kernels),
        float(np.median([taken.seconds for taken in times])), float(np.median([taken.host or 0.0 for taken in times])),
        busy_seconds(kernels), longest(kernels), environment=environment("cuda"),
    )  # fmt: skip


def longest(kernels: Sequence[Kernel], count: int = 12) -> tuple[tuple[str, float], ...]:
    """The names that take most time in all, and that time."""
    totals: dict[str, float] = {}
    for kernel in kernels:
        totals[kernel.name] = totals.get(kernel.name, 0.0) + kernel.seconds
    return tuple(sorted(totals.items(), key=lambda entry: -entry[1])[:count])


def profile_steps(problem: Problem, minibatches: Sequence[int], cuda: Cuda) -> Iterator[ProfileRow]:
    """The engine's step in bfloat16 at every minibatch."""
    scenario = Scenario.shapes(problem, "cuda")
    for minibatch in minibatches:
        step = engine_step(scenario.parts(minibatch, torch.bfloat16))
        for _ in range(_WARMUP):
            step()
        yield profile_row(problem, minibatch, torch.bfloat16, step, cuda)


def parser() -> Parser:
    """The flags of `python -m bench.step_profile`."""
    arguments = Parser(
        prog="python -m bench.step_profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = arguments.add_argument
    add("--extractor", default="vgg19+resnet18", metavar="NAME")
    add("--image-size", type=int, default=32, metavar="PIXELS")
    add("--batch-sizes", type=int, nargs="+", default=[64, 1024], metavar="N", help="(default: 64 1024)")
    add("--json", type=output_file, metavar="FILE", help="write the rows there too")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Trace, write what --json asks for, print the table and the longest kernels."""
    args = parser().parse_args(argv)
    if min(args.batch_sizes) < 2:
        parser().error(f"--batch-sizes: must be at least 2, got {min(args.batch_sizes)}")
    choose_device("cuda")
    with RowFile(args.json) as file:
        rows = file.keep(profile_steps(Problem(args.extractor, args.image_size), args.batch_sizes, Cuda()))
    print_rows(rows)
    for row in rows:
        print(f"\nminibatch {row.minibatch}, longest kernels in all:")
        for name, seconds in row.longest:
            print(f"{1e3 * seconds:8.3f} ms  {name[:100]}")


if __name__ == "__main__":
    run_command(main)
