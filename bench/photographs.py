"""What a first training on one's own photographs draws, and how long it takes.

python -m bench.photographs                  # cuts pictures, trains on them, draws docs/photographs*.png
python -m bench.photographs --amp            # what is given goes to engine.train

The pictures are squares cut at random from six photographs that scikit-learn and scikit-image carry. `python -m
bench.pages` writes the rows that this leaves in bench/results/ into docs/photographs.md.
"""

from __future__ import annotations

import argparse
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

from bench.commands import interruptible
from bench.rows import Row, environment, print_rows, write_json
from engine.configuration.command import run_command
from engine.configuration.config import Config
from engine.configuration.inputs import choose_device
from engine.support.pixels import grid, save_png, to_float
from engine.training.run_folder import COLUMNS, RunFolder

ROOT = Path(__file__).parents[1]
# Name of the picture → flags; the first run takes the defaults.
RUNS = {"photographs": [], "photographs-64": ["--image-size", "64", "--steps", "800"]}
COUNT = 2000
SMALLEST, SAVED = 96, 96
"""Pixels: the side of the smallest square that is cut out, and of the files."""
SHOWN = (100, 300)
"""Steps whose samples stand between the squares and the last samples."""


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


def panels(pictures: Path, run: RunFolder, image_size: int) -> torch.Tensor:
    """Squares of the photographs, then samples of the run at `SHOWN` and at its end, uint8 [3, H, W]."""
    drawn = [_read(run.samples / f"step_{step:08d}.png") for step in SHOWN] + [_read(run.final_samples)]
    files = sorted(pictures.iterdir())[: COLUMNS * COLUMNS]
    real = torch.stack([to_float(_read(file, image_size)) for file in files])
    gap = torch.full_like(drawn[0][..., :8], 255)
    parts = [part for panel in (grid(real, COLUMNS), *drawn) for part in (panel, gap)]
    return torch.cat(parts[:-1], dim=2)


def _read(file: Path, side: int | None = None) -> torch.Tensor:
    picture = Image.open(file).convert("RGB")
    if side is not None:
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def train(pictures: Path, flags: list[str], picture: Path) -> PhotographsRow:
    """One run; its panels go to `picture`."""
    run = RunFolder(pictures.parent / picture.stem)
    command = [sys.executable, "-m", "engine.train", "--data", str(pictures), "--out", str(run.path), *flags]
    begun = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - begun
    config = Config.load(run.config)
    save_png(picture, panels(pictures, run, config.data.image_size))
    return PhotographsRow(
        flags=" ".join(flags),
        pictures=COUNT,
        image_size=config.data.image_size,
        extractor=config.networks.extractor,
        steps=config.training.steps,
        seconds=seconds,
        environment=environment(choose_device(config.training.device)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.photographs", description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, metavar="DIR", default=ROOT / "docs", help="of the pictures")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the rows (default: one of the day in bench/results/)"
    )
    arguments, flags = parser.parse_known_args(argv)
    rows = []
    with interruptible(), tempfile.TemporaryDirectory() as temporary:
        pictures = Path(temporary) / "pictures"
        pictures.mkdir()
        cut(pictures)
        for name, own in RUNS.items():
            rows.append(train(pictures, [*own, *flags], arguments.docs / f"{name}.png"))
            write_json(arguments.json or ROOT / f"bench/results/photographs_{time.strftime('%Y-%m-%d')}.json", rows)
    print_rows(rows)


if __name__ == "__main__":
    run_command(main)
