"""How many operators a training step hands to PyTorch on CUDA, counted without a GPU.

    python -m bench.dispatches [--preset cifar10] [--extractor NAME] [--batch-size 64] [--amp-dtype bf16|fp16|none]

An eager step of a small minibatch takes as long as the host needs to dispatch its operators, some 20 to 40 µs each, and
a CUDA graph of it has a node for every kernel. So their number is a budget, which `tests/bench/test_dispatches.py`
keeps.

The trainer's own third step runs on fake CPU tensors (PyTorch's FakeTensorMode: shapes, no data) with the Triton
operators and plain convolutions, as on CUDA. Counted is what reaches the dispatcher below autograd. Views are counted
and told apart: they launch nothing. Not counted are `detach`, which autograd does for itself whenever it keeps a
tensor, and what only looks (`prim`, `profiler`). One operator may be several kernels: cuDNN adds a bias by one of its
own.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import importlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from bench.rows import Row, table, write_json
from engine.comparison.reference.target import fake_target
from engine.configuration.build import bare_extractor, make_generator, make_method
from engine.configuration.command import Parser, output_file, run_command
from engine.configuration.config import Config
from engine.configuration.inputs import amp_dtype
from engine.configuration.presets import COMPARING_PRESETS
from engine.configuration.running import make_schedule
from engine.training.planner import FakeMode, fake_copy
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer

WARMUP = 2
"""Steps after which every state exists: Adam's, and the average of the generator's weights."""
_NOT_COUNTED = ("prim", "profiler")
_ENGINE = Path(engine.__file__).parent
_OPTIMIZERS = Path(torch.optim.__file__).parent
# Who calls an operator: the innermost of these files in the stack.
_PARTS = {
    "generation/priors": "noise",
    "generation": "generator",
    "representation": "extractor",
    "comparison": "criterion",
    "methods": "method",
    "training/weight_average": "weight average",
    "training": "trainer",
}


@dataclass(frozen=True)
class Dispatch:
    """One operator that was called.

    Attributes:
        operator: such as "aten.convolution.default".
        part: of the step: "generator", "extractor", "criterion", "optimizer", …
        backward: whether autograd's backward called it.
        view: whether it only makes a view, so that nothing is launched.
    """

    operator: str
    part: str
    backward: bool
    view: bool


class DispatchCounter(TorchDispatchMode):
    """Keeps what is dispatched while it is entered, in `dispatches`."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatches: list[Dispatch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in _NOT_COUNTED and func is not torch.ops.aten.detach.default:
            backward = torch._C._current_autograd_node() is not None
            self.dispatches.append(Dispatch(str(func), _part(backward), backward, func.is_view))
        return func(*args, **(kwargs or {}))


def _part(backward: bool) -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_OPTIMIZERS):
            return "optimizer"
        if path.is_relative_to(_ENGINE):
            name = path.relative_to(_ENGINE).as_posix()
            part = next((part for start, part in _PARTS.items() if name.startswith(start)), "other")
            # What autograd computes outside of the engine's own functions are the generator's gradients.
            return "generator" if backward and part == "method" else part
        frame = frame.f_back
    return "other"


def dispatches(config: Config) -> list[Dispatch]:
    """What a step of training as `config` says dispatches; for moment matching."""
    mode, counter = FakeMode(), DispatchCounter()
    generator = fake_copy(make_generator(config), mode)
    extractor = fake_copy(bare_extractor(config), mode, amp_dtype(config))
    triton = importlib.import_module("kernels.triton")
    with mode:
        method = make_method(config, generator, extractor, fake_target(extractor.num_features), kernels=triton)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by copying a generator
            trainer = Trainer(method, make_schedule(config), RunFolder("nowhere"), {}, kernels=triton)
        for _ in range(WARMUP):
            trainer.train_step()
        with counter:
            trainer.train_step()
    return counter.dispatches


@dataclass(frozen=True, kw_only=True)
class DispatchRow(Row):
    """One operator in one part of the step.

    Attributes:
        part: of the step.
        operator: its name.
        forward, backward: calls.
        view: whether it only makes a view.
    """

    part: str
    operator: str
    forward: int
    backward: int
    view: bool


def rows(found: Iterable[Dispatch]) -> list[DispatchRow]:
    """One row for every operator in every part, most calls first."""
    counts = Counter(found)
    keys = {(entry.part, entry.operator, entry.view): None for entry in counts}
    made = [
        DispatchRow(
            part=part,
            operator=operator,
            view=view,
            forward=counts[Dispatch(operator, part, False, view)],
            backward=counts[Dispatch(operator, part, True, view)],
        )
        for part, operator, view in keys
    ]
    return sorted(made, key=lambda row: -row.forward - row.backward)


def print_dispatches(found: Sequence[DispatchRow]) -> None:
    """Operators by number of calls with the parts that call them, then the sums."""
    lines: dict[tuple[str, bool], list[DispatchRow]] = {}
    for row in found:
        lines.setdefault((row.operator, row.view), []).append(row)
    ordered = sorted(lines.items(), key=lambda line: -sum(row.forward + row.backward for row in line[1]))
    cells = [
        (
            operator,
            "view" if view else "",
            sum(row.forward for row in own),
            sum(row.backward for row in own),
            sum(row.forward + row.backward for row in own),
            ", ".join(f"{row.part} {row.forward}+{row.backward}" for row in own),
        )
        for (operator, view), own in ordered
    ]
    print(table(("operator", "", "forward", "backward", "calls", "called by (forward + backward)"), cells))
    parts = {row.part: None for row in found}
    sums = [
        (
            part,
            sum(row.forward for row in found if row.part == part),
            sum(row.backward for row in found if row.part == part),
        )
        for part in parts
    ]
    print()
    print(table(("part", "forward", "backward"), sums))
    total = sum(row.forward + row.backward for row in found)
    views = sum(row.forward + row.backward for row in found if row.view)
    print(f"\n{total} operators, {views} of them views, which launch nothing")


def parser() -> Parser:
    """The flags of `python -m bench.dispatches`."""
    arguments = Parser(
        prog="python -m bench.dispatches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = arguments.add_argument
    add("--preset", choices=COMPARING_PRESETS, default="cifar10", help="default: %(default)s")
    add("--extractor", metavar="NAME", help="in place of the preset's")
    add("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--amp-dtype", choices=("bf16", "fp16", "none"), default="bf16", help="default: %(default)s")
    add("--json", type=output_file, metavar="FILE", help="write the rows there too")
    return arguments


def configuration(preset: str, extractor: str | None, batch_size: int, amp: str) -> Config:
    """The preset's configuration, with random weights."""
    given: dict[str, Any] = {"weights": ("random",), "batch_size": batch_size, "amp": amp != "none"}
    if extractor is not None:
        given["extractor"] = extractor
    if amp != "none":
        given["amp_dtype"] = amp
    return Config.build(preset, given)


def main(argv: Sequence[str] | None = None) -> None:
    """Count, write what --json asks for, print the tables."""
    args = parser().parse_args(argv)
    found = rows(dispatches(configuration(args.preset, args.extractor, args.batch_size, args.amp_dtype)))
    if args.json is not None:
        write_json(args.json, found)
    print_dispatches(found)


if __name__ == "__main__":
    run_command(main)
