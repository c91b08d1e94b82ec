"""`python -m engine.sample`: draw images from a trained generator."""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.configuration.command import Parser, memory_advice, output_file, run_command
from engine.configuration.inputs import check_seed, choose_device, load_run_sampler
from engine.support.errors import InputError
from engine.support.files import atomic_file
from engine.support.pixels import pixel_grid, save_png
from engine.training.planner import shown_bytes
from engine.training.progress import Progress
from pipelines.decoding.preprocessing import MAX_PIXELS

log = logging.getLogger("gfmn")

_STEPS = 8
"""Images in a row of `--interpolate`."""
_MOST = 10**12
"""More images than any disk holds."""


def parser() -> Parser:
    """The flags of `python -m engine.sample`."""
    parser = Parser(
        prog="python -m engine.sample",
        description="Draw images from a run's generator: a grid (.png), or an array uint8 [N, H, W, 3] (.npy), written "
        "while it is drawn.",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="folder of a training run")
    add("--count", type=int, default=64, metavar="N", help="images (default: 64)")
    add("--out", type=output_file, required=True, metavar="FILE", help="grid.png or samples.npy")
    add("--seed", type=int, default=0, metavar="N", help="of z (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to draw (default: auto)")
    add("--best", action="store_true", help="the generator that --evaluate-every found best")
    add("--interpolate", action="store_true", help=f"rows of {_STEPS} images, each from one random z to another")
    return parser


@memory_advice("a .npy file needs no more for many images than for few")
def main(argv: Sequence[str] | None = None) -> None:
    """Check, draw, write a grid or an array."""
    arguments = parser().parse_args(argv)
    out: Path = arguments.out
    count = arguments.count
    _check(arguments, out)
    device = choose_device(arguments.device)
    sampler = load_run_sampler(arguments.run, best=arguments.best)
    sampler.to(device)
    side = sampler.generator.spec.image_size
    columns = _STEPS if arguments.interpolate else math.ceil(math.sqrt(count))
    if out.suffix == ".png":
        _check_picture(count, columns, side)
    else:
        _check_room(out, count, side)
    if arguments.interpolate:
        batches = sampler.path_batches(math.ceil(count / _STEPS), _STEPS, arguments.seed)
    else:
        batches = sampler.pixel_batches(count, arguments.seed)
    batches = _first(count, batches)
    if out.suffix == ".png":
        save_png(out, pixel_grid(torch.cat(list(batches)), columns))
    else:
        _save_array(out, batches, count, side)
    log.info("%s: %d images of step %d", out, count, sampler.step)


def _first(count: int, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The first `count` images of `batches`; on standard error how many there are by now."""
    with Progress("drawing", count, unit="images") as progress:
        for batch in batches:
            part = batch[: count - progress.done]
            yield part
            progress.advance(len(part))


def _save_array(out: Path, batches: Iterable[Tensor], count: int, side: int) -> None:
    """Write uint8 [count, side, side, 3] as a .npy file, a batch at a time, whole or not at all."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, side, side, 3)}
    with atomic_file(out) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            file.write(batch.numpy().data)


def _check(arguments: Any, out: Path) -> None:
    if not 1 <= arguments.count <= _MOST:
        raise InputError("count", f"must be from 1 to {_MOST}, got {arguments.count}")
    if out.suffix not in (".png", ".npy"):
        raise InputError("out", f"{out} must end in .png or .npy")
    if out.is_dir():
        raise InputError("out", f"{out} is a folder; name a file")
    check_seed(arguments.seed)


def _check_picture(count: int, columns: int, side: int) -> None:
    """InputError on `count` if the grid has more pixels than a picture may have, here and elsewhere."""
    pixels = columns * math.ceil(count / columns) * (side + 2) ** 2
    if pixels > MAX_PIXELS:
        raise InputError(
            "count",
            f"{count} images make a picture of {pixels:,} pixels, and programs refuse to open one of more than "
            f"{MAX_PIXELS:,}; about {MAX_PIXELS // (side + 2) ** 2} images fit, a .npy file takes any number",
        )


def _check_room(out: Path, count: int, side: int) -> None:
    """InputError on `count` if the array is larger than what is free on the disk."""
    if out.exists() and not out.is_file():  # a device or a pipe
        return
    size = count * side * side * 3
    folder = next(filter(os.path.isdir, Path(os.path.realpath(out)).parents))
    if size > (free := shutil.disk_usage(folder).free):
        raise InputError("count", f"{count} images take {shown_bytes(size)}, and the disk has {shown_bytes(free)} free")


if __name__ == "__main__":
    run_command(main)
