"""What a training step costs: a process that builds a run as `engine.train` does, and times some of its steps.

It stands alone, as a run of the comparison does, with the same threads. Set-up and what is written at the end are not
counted, nor the first steps, which compile kernels.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.commands import check, run_module
from bench.paper.training import configured
from engine.configuration.command import Parser, run_command
from engine.configuration.inputs import choose_device
from engine.configuration.planning import choose_chunk
from engine.support.files import write_atomically
from engine.train import build
from engine.training.precision import repeatable
from engine.training.ranks import ALONE
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer

_LEAST = 2.0
"""Seconds that are timed, or the counted steps are repeated while the run has more."""


@dataclass(frozen=True)
class Span:
    """Steps of one kind: `skipped` at first, then `counted` that are timed, or a multiple of them in the run's last."""

    skipped: int
    counted: int


def seconds_per_step(flags: Sequence[str], spans: Sequence[Span], threads: int | None = None) -> list[float]:
    """Seconds of a step in each of `spans`, which follow one another in the run `engine.train FLAGS…`.

    CPU seconds of all threads together, or on a GPU seconds by the clock. RunFailed if the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        told = json.dumps([dataclasses.astuple(span) for span in spans])
        print(f"python -m engine.train {' '.join(flags)}: what a step costs", file=sys.stderr, flush=True)
        ended = run_module("bench.paper.cost", [str(file), told, "--", *flags], threads=threads)
        check(ended, f"what a step costs: python -m engine.train {' '.join(flags)}")
        return [float(seconds) for seconds in json.loads(file.read_text())]


def timed(trainer: Trainer, spans: Sequence[Span]) -> list[float]:
    """Seconds of a step in each of `spans`."""
    found = []
    for place, span in enumerate(spans):
        _take(trainer, span.skipped)
        seconds, steps = _take(trainer, span.counted), span.counted
        last = place == len(spans) - 1
        while last and seconds < _LEAST and trainer.step + span.counted <= trainer.schedule.steps:
            seconds, steps = seconds + _take(trainer, span.counted), steps + span.counted
        found.append(seconds / steps)
    trainer.check_finite()
    return found


def _take(trainer: Trainer, steps: int) -> float:
    """Seconds of so many steps."""
    begun = _now(trainer.device)
    for _ in range(steps):
        trainer.train_step()
        if trainer.device.type == "cpu":  # as in `Trainer.fit`
            trainer.check_finite()
    return _now(trainer.device) - begun


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line that `seconds_per_step` writes."""
    parser = Parser(
        prog="python -m bench.paper.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="for seconds of a step in each span")
    parser.add_argument("spans", type=json.loads, metavar="SPANS", help="[[steps not timed, steps timed], …]")
    parser.add_argument("flags", nargs="+", metavar="FLAGS", help="of engine.train, after --")
    arguments = parser.parse_args(argv)
    asked = configured(arguments.flags)
    device = choose_device(asked.training.device, asked.training.threads, asked.training.float32)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        with run.owned(made=False), repeatable():
            trainer = build(choose_chunk(asked, device, ALONE), run, device, None)
            seconds = timed(trainer, [Span(*numbers) for numbers in arguments.spans])
    write_atomically(arguments.file, (json.dumps(seconds) + "\n").encode())


if __name__ == "__main__":
    run_command(main)
