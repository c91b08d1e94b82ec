"""`python -m engine.sample`: draw images from a trained generator, or real ones again from their codes."""

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

from engine.configuration.command import Parser, check_two_files, memory_advice, output_file, run_command
from engine.configuration.config import Config
from engine.configuration.inputs import check_seed, choose_device, load_run_sampler
from engine.configuration.methods import AUTOENCODING, named
from engine.generation.saved import SavedSampler
from engine.support.errors import InputError
from engine.support.files import atomic_file
from engine.support.pixels import pixel_grid, save_png, to_float, to_uint8
from engine.training.planner import shown_bytes
from engine.training.progress import Progress
from engine.training.run_folder import RunFolder
from pipelines import DataError, read_files, usual_crop
from pipelines.decoding.preprocessing import MAX_PIXELS, Preprocessing

log = logging.getLogger("gfmn")

_STEPS = 8
"""Images in a row of `--interpolate`."""
_COUNT, _SEED = 64, 0
_MOST = 10**12
"""More images than any disk holds."""


def parser() -> Parser:
    """The flags of `python -m engine.sample`."""
    parser = Parser(
        prog="python -m engine.sample",
        description="Draw images from a run's generator: a grid (.png), or an array uint8 [N, H, W, 3] (.npy), written "
        "while it is drawn. Of a run that has an encoder also: pictures of one's own, encoded and drawn again.",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="folder of a training run")
    add("--count", type=int, metavar="N", help=f"images (default: {_COUNT})")
    add("--out", type=output_file, required=True, metavar="FILE", help="grid.png or samples.npy")
    add("--seed", type=int, metavar="N", help=f"of z (default: {_SEED})")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to draw (default: auto)")
    add("--best", action="store_true", help="the generator that --evaluate-every found best")
    path = f"rows of {_STEPS} images, each from one random z to another"
    add("--interpolate", action="store_const", const=True, help=path)
    add(
        "--encode",
        nargs="+",
        metavar="IMAGE",
        help="in place of samples, image files, cropped, resized and framed as the run's real images: in "
        "a .png each beside what the generator makes of its code, in a .npy that alone",
    )
    add(
        "--codes",
        type=output_file,
        metavar="FILE",
        help="where to write the codes of --encode, float32 [N, nz] (.npy); of Gaussians of codes the means",
    )
    return parser


@memory_advice("a .npy file needs no more for many images than for few")
def main(argv: Sequence[str] | None = None) -> None:
    """Check, draw, write a grid or an array."""
    arguments = parser().parse_args(argv)
    out: Path = arguments.out
    _check(arguments, out)
    device = choose_device(arguments.device)
    sampler = load_run_sampler(arguments.run, best=arguments.best)
    sampler.to(device)
    if arguments.encode is not None:
        _encode(arguments, sampler)
        return
    count: int = _COUNT if arguments.count is None else arguments.count
    seed: int = _SEED if arguments.seed is None else arguments.seed
    side = sampler.generator.spec.image_size
    columns = _STEPS if arguments.interpolate else math.ceil(math.sqrt(count))
    if out.suffix == ".png":
        _check_picture(count, columns, side)
    else:
        _check_room(out, count, side)
    if arguments.interpolate:
        batches = sampler.path_batches(math.ceil(count / _STEPS), _STEPS, seed)
    else:
        batches = sampler.pixel_batches(count, seed)
    batches = _first(count, batches)
    if out.suffix == ".png":
        save_png(out, pixel_grid(torch.cat(list(batches)), columns))
    else:
        _save_array(out, batches, count, side)
    log.info("%s: %d images of step %d", out, count, sampler.step)


def _encode(arguments: Any, sampler: SavedSampler) -> None:
    """Encode pictures and draw them again; write both, or what was drawn alone, and the codes if they are wanted."""
    if sampler.encoder is None:
        raise InputError("encode", f"{arguments.run} has no encoder, as runs of {named(AUTOENCODING)} have")
    out: Path = arguments.out
    count, side = len(arguments.encode), sampler.generator.spec.image_size
    columns = 2 * math.ceil(math.sqrt(count / 2))
    if out.suffix == ".png":
        _check_picture(2 * count, columns, side, "encode")
    data = Config.load(RunFolder(arguments.run).config).data
    crop = usual_crop(data.dataset, data.center_crop)
    try:
        pixels = read_files(arguments.encode, Preprocessing(image_size=side, center_crop=crop), data.dataset)
    except DataError as error:
        raise InputError("encode", str(error)) from None
    codes = sampler.encode(to_float(pixels))
    drawn = to_uint8(sampler.decode(codes))
    if out.suffix == ".png":
        pairs = torch.stack((pixels.permute(0, 2, 3, 1), drawn), dim=1).flatten(0, 1)
        save_png(out, pixel_grid(pairs, columns))
    else:
        _save_array(out, [drawn], count, side)
    if arguments.codes is not None:
        with atomic_file(arguments.codes) as file:
            np.lib.format.write_array(file, codes.numpy(), allow_pickle=False)
    log.info("%s: %d images, encoded and drawn at step %d", out, count, sampler.step)


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
    if arguments.encode is not None:
        for name in ("count", "seed", "interpolate"):
            if getattr(arguments, name) is not None:
                raise InputError(name, "is that of random z, and --encode has the codes of pictures; leave out one")
    elif arguments.codes is not None:
        raise InputError("codes", "are those of --encode IMAGE, which is not given")
    if arguments.codes is not None and arguments.codes.suffix != ".npy":
        raise InputError("codes", f"{arguments.codes} must end in .npy")
    check_two_files(arguments, "out", "codes")
    check_two_files(arguments, "encode", "out")
    if arguments.count is not None and not 1 <= arguments.count <= _MOST:
        raise InputError("count", f"must be from 1 to {_MOST}, got {arguments.count}")
    if out.suffix not in (".png", ".npy"):
        raise InputError("out", f"{out} must end in .png or .npy")
    check_seed(_SEED if arguments.seed is None else arguments.seed)


def _check_picture(count: int, columns: int, side: int, argument: str = "count") -> None:
    """InputError on `argument` if the grid has more pixels than a picture may have, here and elsewhere."""
    pixels = columns * math.ceil(count / columns) * (side + 2) ** 2
    if pixels > MAX_PIXELS:
        raise InputError(
            argument,
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
