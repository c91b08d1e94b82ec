"""`python -m engine.sample`: draw images from a trained generator."""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.configuration.command import Parser, output_file, run_command
from engine.configuration.inputs import load_run_sampler
from engine.support.errors import InputError
from engine.support.files import write_atomically
from engine.support.pixels import grid, save_png, to_uint8

log = logging.getLogger("gfmn")

_STEPS = 8
"""Images in a row of `--interpolate`."""


def parser() -> Parser:
    """The flags of `python -m engine.sample`."""
    parser = Parser(
        prog="python -m engine.sample",
        description="Draw images from a run's generator: a grid (.png), or an array uint8 [N, H, W, 3] (.npy).",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="folder of a training run")
    add("--count", type=int, default=64, metavar="N", help="images (default: 64)")
    add("--out", type=output_file, required=True, metavar="FILE", help="grid.png or samples.npy")
    add("--seed", type=int, default=0, metavar="N", help="of z (default: 0)")
    add("--best", action="store_true", help="the generator that --evaluate-every found best")
    add("--interpolate", action="store_true", help=f"rows of {_STEPS} images, each from one random z to another")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check, draw, write a grid or an array."""
    arguments = parser().parse_args(argv)
    out: Path = arguments.out
    _check(arguments, out)
    sampler = load_run_sampler(arguments.run, best=arguments.best)
    if arguments.interpolate:
        rows = math.ceil(arguments.count / _STEPS)
        images = sampler.draw_paths(rows, _STEPS, arguments.seed)[: arguments.count]
    else:
        images = sampler.draw(arguments.count, arguments.seed)
    if out.suffix == ".png":
        columns = _STEPS if arguments.interpolate else math.ceil(math.sqrt(arguments.count))
        save_png(out, grid(images, columns))
    else:
        buffer = io.BytesIO()
        np.save(buffer, to_uint8(images).numpy())
        write_atomically(out, buffer.getvalue())
    log.info("%s: %d images of step %d", out, len(images), sampler.step)


def _check(arguments: Any, out: Path) -> None:
    if arguments.count < 1:
        raise InputError("count", f"must be at least 1, got {arguments.count}")
    if out.suffix not in (".png", ".npy"):
        raise InputError("out", f"{out} must end in .png or .npy")


if __name__ == "__main__":
    run_command(main)
