"""What a first training on one's own photographs draws, and how long it takes.

python -m bench.photographs                  # cuts pictures, trains with the defaults, draws docs/photographs.png
python -m bench.photographs --amp            # what follows goes to engine.train

The pictures are squares cut at random from six photographs that scikit-learn and scikit-image carry. `python -m
bench.pages` writes the row that this leaves in bench/results/ into docs/data.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from bench.rows import Row, print_rows, write_json
from engine.configuration.command import Parser, run_command
from engine.support.pixels import save_png
from engine.training.run_folder import COLUMNS, RunFolder

ROOT = Path(__file__).parents[1]
COUNT = 2000
SMALLEST, SAVED = 96, 96
"""Pixels: the side of the smallest square that is cut out, and of the files."""


@dataclass(frozen=True, kw_only=True)
class PhotographsRow(Row):
    """One training on photographs.

    Attributes:
        flags: what was given to engine.train besides the pictures.
        pictures: in the folder.
        image_size: side of the images, in pixels.
        extractor: whose features were matched.
        steps: of the training.
        seconds: of the whole command.
    """

    flags: str
    pictures: int
    image_size: int
    extractor: str
    steps: int
    seconds: float


def photographs() -> list[np.ndarray]:
    """Six colour photographs, uint8 [H, W, 3]."""
    from skimage import data

    return [*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]


def cut(folder: Path, count: int = COUNT, seed: int = 0) -> None:
    """Write `count` squares of the photographs as JPEG files; their places and sides are uniform."""
    random = np.random.default_rng(seed)
    sources = photographs()
    for number in range(count):
        source = sources[number % len(sources)]
        height, width = source.shape[:2]
        side = int(random.integers(SMALLEST, min(height, width) // 2 + 1))
        top, left = int(random.integers(height - side + 1)), int(random.integers(width - side + 1))
        square = Image.fromarray(source[top : top + side, left : left + side])
        square.resize((SAVED, SAVED), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=95)


def beside(pictures: Path, run: RunFolder, image_size: int) -> torch.Tensor:
    """Pictures on the left and samples of the run on the right, uint8 [3, H, W]."""
    drawn = torch.from_numpy(np.asarray(Image.open(run.final_samples).convert("RGB")).copy()).permute(2, 0, 1)
    pitch = image_size + 2
    real = torch.full_like(drawn, 64)
    for place, file in enumerate(sorted(pictures.iterdir())[: COLUMNS * COLUMNS]):
        picture = np.asarray(Image.open(file).resize((image_size, image_size), Image.Resampling.BILINEAR))
        row, column = divmod(place, COLUMNS)
        top, left = 2 + row * pitch, 2 + column * pitch
        real[:, top : top + image_size, left : left + image_size] = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    return torch.cat([real, torch.full_like(drawn[..., :12], 255), drawn], dim=2)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = Parser(prog="python -m bench.photographs", description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, metavar="FILE", default=ROOT / "docs/photographs.png")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="default: a file in bench/results/ named by the day")
    arguments, flags = parser.parse_known_args(argv)
    rows = arguments.rows or ROOT / f"bench/results/photographs_{time.strftime('%Y-%m-%d')}.json"
    with tempfile.TemporaryDirectory() as temporary:
        pictures, run = Path(temporary) / "photographs", RunFolder(Path(temporary) / "run")
        pictures.mkdir()
        cut(pictures)
        command = [sys.executable, "-m", "engine.train", "--data", str(pictures), "--out", str(run.path), *flags]
        begun = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begun
        config = json.loads(run.config.read_text())
        save_png(arguments.picture, beside(pictures, run, config["data"]["image_size"]))
    row = PhotographsRow(
        flags=" ".join(flags),
        pictures=COUNT,
        image_size=config["data"]["image_size"],
        extractor=config["networks"]["extractor"],
        steps=config["training"]["steps"],
        seconds=seconds,
    )
    write_json(rows, [row])
    print_rows([row])


if __name__ == "__main__":
    run_command(main)
