"""`python -m engine.sample`: draw images from a trained generator."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint import load_generator
from engine.cli import Parser, run_command
from engine.config import Config
from engine.errors import InputError
from engine.files import write_atomically
from engine.images import grid, save_png, to_uint8
from engine.run_folder import RunFolder
from engine.trainer import sample

log = logging.getLogger("gfmn")

_STEPS = 8


def parser() -> Parser:
    """The command line."""
    arguments = Parser(
        prog="python -m engine.sample",
        description="Draw images from a run's generator: a grid (.png), or an array uint8 [N, H, W, 3] (.npy).",
    )
    arguments.add_argument("--run", required=True, metavar="DIR", help="folder of a training run")
    arguments.add_argument("--count", type=int, default=64, metavar="N", help="images (default: 64)")
    arguments.add_argument("--out", required=True, metavar="FILE", help="grid.png or samples.npy")
    arguments.add_argument("--seed", type=int, default=0, metavar="N", help="of z (default: 0)")
    arguments.add_argument(
        "--interpolate", action="store_true", help=f"rows of {_STEPS} images on the way from one z to another"
    )
    return arguments


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Great-circle paths between rows of `start` and `end` [R, nz], as [R · steps, nz] (White 2016, section 2.1).

    A straight line between two Gaussian vectors passes through short vectors that a generator never sees; the arc
    sin((1−t)ω)/sin ω · start + sin(tω)/sin ω · end, with ω the angle between them, does not.
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=1).clamp(-1, 1)
    angle = cosine.arccos().view(-1, 1, 1).clamp(min=1e-6)
    t = torch.linspace(0, 1, steps).view(1, -1, 1)
    path = ((1 - t) * angle).sin() * start.unsqueeze(1) + (t * angle).sin() * end.unsqueeze(1)
    return (path / angle.sin()).flatten(0, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, sample, write."""
    arguments = parser().parse_args(argv)
    out, run = Path(arguments.out), RunFolder(arguments.run)
    if arguments.count < 1:
        raise InputError(f"--count: must be at least 1, got {arguments.count}")
    if out.suffix not in (".png", ".npy"):
        raise InputError(f"--out: {out} must end in .png or .npy")
    if not run.path.is_dir():
        raise InputError(f"--run: {run.path} is not a folder")
    if not run.generator.exists():
        raise InputError(
            f"--run: {run.path} has no generator yet; train it with python -m engine.train --out {run.path}"
        )
    saved = load_generator(run.generator)
    random = torch.Generator().manual_seed(arguments.seed)
    if arguments.interpolate:
        rows = math.ceil(arguments.count / _STEPS)
        ends = torch.randn(2, rows, saved.nz, generator=random)
        z = interpolate(ends[0], ends[1], _STEPS)[: arguments.count]
    else:
        z = torch.randn(arguments.count, saved.nz, generator=random)
    batch_statistics = Config.load(run.config).networks.sample_bn == "batch"
    images = sample(saved.module, z, batch_statistics=batch_statistics)
    if out.suffix == ".png":
        columns = _STEPS if arguments.interpolate else math.ceil(math.sqrt(arguments.count))
        save_png(out, grid(images, columns))
    else:
        buffer = io.BytesIO()
        np.save(buffer, to_uint8(images).numpy())
        write_atomically(out, buffer.getvalue())
    log.info("%s: %d images of step %d", out, len(images), saved.step)


if __name__ == "__main__":
    run_command(main)
