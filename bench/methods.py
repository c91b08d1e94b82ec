"""What each method draws of the digits, in minutes: a picture, its reading by two judges, and its time.

python -m bench.methods                      # all of them, into docs/methods/ and bench/results/
python -m bench.methods --only mmd frechet   # these again; the rows of the others stay as they are
python -m bench.methods --imagenet           # instead: ImageNet features, matched by two methods

The judges have seen no method: a support vector machine on real 8×8 digits (`bench.digit_judge`), and the kernel
distance of EfficientNet-Lite0's ImageNet features. Where it is these features that are matched (`--imagenet`), the
second judge is the demo's own network, which was pretrained on the digits. `python -m bench.pages` writes the rows into
docs/methods.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.digit_judge import DigitJudge
from bench.rows import Row, environment, newest_file, print_rows, read_json, write_json
from engine.configuration.build import pretrained_files
from engine.configuration.command import Parser, run_command
from engine.configuration.config import Config
from engine.configuration.inputs import choose_device, load_run_sampler, open_data
from engine.evaluation.judges import EvaluationNetwork, evaluation_network
from engine.evaluation.metrics import compute_metrics
from engine.support.errors import InputError
from engine.support.pixels import pixel_grid, save_png
from engine.training.run_folder import RunFolder
from pipelines import read_pixels

ROOT = Path(__file__).parents[1]
RUNS: dict[str, tuple[str, ...]] = {
    "gfmn": (),
    "gfmn-ema": ("--population", "ema"),
    "mmd": ("--method", "mmd"),
    "frechet": ("--method", "frechet"),
    "sinkhorn": ("--method", "sinkhorn"),
    "drifting": ("--method", "drifting"),
    "gmmn": ("--method", "gmmn"),
}
"""Name of the picture → flags of engine.train, with the preset of the digits."""
JUDGE = "efficientnet-lite0"
_MATCHED = ("--extractor", JUDGE, "--weights", "imagenet")
IMAGENET: dict[str, tuple[str, ...]] = {
    "imagenet-gfmn": (*_MATCHED, "--steps", "500"),
    "imagenet-frechet": (*_MATCHED, "--steps", "500", "--method", "frechet", "--pool", "grid2"),
}
"""The same for `--imagenet`: as many steps of both."""
SAMPLES, SHOWN, COLUMNS = 1_797, 48, 16
"""Samples that are judged, as many as there are real digits; samples in the picture, and in a row of it."""


@dataclass(frozen=True, kw_only=True)
class MethodRow(Row):
    """One method on the digits.

    Attributes:
        name: of the run and of its picture.
        flags: what was given to engine.train.
        summary: what is compared, in the engine's words.
        steps, minibatch: of the training.
        seconds: of the whole command, the extractor's pretraining left out.
        confident: share of the samples that the first judge reads with confidence.
        least_share, largest_share: of the ten digits among the samples.
        least_variety, largest_variety: of the ten, pixel deviation within a class over the real digits'.
        chroma: colour on ink, of 255; real digits have 0.
        kernel_distance: to all real digits, by the second judge.
        judge: that one's network; None for `JUDGE`.
    """

    name: str
    flags: str
    summary: str
    steps: int
    minibatch: int
    seconds: float
    confident: float
    least_share: float
    largest_share: float
    least_variety: float
    largest_variety: float
    chroma: float
    kernel_distance: float
    judge: str | None = None


def run(name: str, flags: Sequence[str], folder: Path, picture: Path, imagenet: bool = False) -> MethodRow:
    """Train, draw and judge; samples go to `picture`. `imagenet`: `JUDGE` is what is matched, and so another judges."""
    found = RunFolder(folder / name)
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "engine.train", "--preset", "digits", "--out", str(found.path), *flags], check=True
    )
    seconds = time.perf_counter() - begun
    config = Config.load(found.config)
    device = choose_device(config.training.device)
    samples = load_run_sampler(found.path).to(device).draw_pixels(SAMPLES, seed=1)
    pixels = samples.permute(0, 2, 3, 1).contiguous().cpu()
    save_png(picture, pixel_grid(pixels[:SHOWN], COLUMNS))
    verdict = DigitJudge().judge(pixels.numpy())
    network = _demo_network() if imagenet else evaluation_network(JUDGE, image_size=config.data.image_size)
    real = read_pixels(open_data(config))
    distance = compute_metrics(samples, real, network, metrics=("kid",), device=device)["kernel_distance"]
    return MethodRow(
        name=name,
        flags=" ".join(flags),
        summary=config.summary,
        steps=config.training.steps,
        minibatch=config.training.batch_size,
        seconds=seconds,
        confident=verdict.confident,
        least_share=float(verdict.shares.min()),
        largest_share=float(verdict.shares.max()),
        least_variety=float(verdict.deviation_ratios.min()),
        largest_variety=float(verdict.deviation_ratios.max()),
        chroma=verdict.chroma,
        kernel_distance=distance,
        judge=network.label if imagenet else None,
        environment=environment(device),
    )


def _demo_network() -> EvaluationNetwork:
    """What the demo pretrains on the digits, from the cache."""
    config = Config.build("digits", {})
    ((name, weights),) = pretrained_files(config, open_data(config), choose_device(config.training.device)).items()
    return evaluation_network(name, weights=weights, image_size=config.data.image_size)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = Parser(
        prog="python -m bench.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--imagenet", action="store_true", help="match ImageNet features instead, by gfmn and by frechet")
    add("--only", nargs="+", choices=(*RUNS, *IMAGENET), metavar="NAME", help="some of the runs")
    add("--docs", type=Path, metavar="DIR", default=ROOT / "docs/methods", help="of the pictures")
    add("--json", type=Path, metavar="FILE", help="the rows (default: one of the day in bench/results/); with --only, "
        "rows of other runs in it, or else in the newest one, are kept")  # fmt: skip
    add("--steps", type=int, metavar="N", help="in place of the preset's, to try the command")
    arguments = parser.parse_args(argv)
    runs = IMAGENET if arguments.imagenet else RUNS
    chosen = arguments.only or tuple(runs)
    for name in chosen:
        if name not in runs:
            parser.error(f"--only: {name} belongs to the runs {'without' if arguments.imagenet else 'with'} --imagenet")
    more = () if arguments.steps is None else ("--steps", str(arguments.steps))
    kind = "methods_imagenet" if arguments.imagenet else "methods_digits"
    results = ROOT / "bench/results"
    file = arguments.json or results / f"{kind}_{time.strftime('%Y-%m-%d')}.json"
    before = () if arguments.only is None else rows_before(file, None if arguments.json else newest_file(results, kind))
    arguments.docs.mkdir(parents=True, exist_ok=True)
    rows: dict[str, MethodRow] = {row.name: row for row in before if row.name in runs}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _pretrain()
        for name in chosen:
            picture = arguments.docs / f"{name}.png"
            rows[name] = run(name, (*runs[name], *more), folder, picture, arguments.imagenet)
            write_json(file, [rows[known] for known in runs if known in rows])
    print_rows([rows[name] for name in chosen])


def rows_before(file: Path, newest: Path | None) -> list[MethodRow]:
    """Of `file` if it is there, else of the `newest`; InputError if it holds anything else."""
    found = file if file.exists() else newest
    if found is None:
        return []
    try:
        return read_json(found, MethodRow)
    except (OSError, TypeError, ValueError) as error:
        raise InputError("json", f"{found} holds no rows of methods ({error}); give another file") from None


def _pretrain() -> None:
    """Leave the extractor and the target in the cache, so that the first run's time is as the others'."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "engine.train", "--preset", "digits", "--steps", "1"]
        if subprocess.run([*command, "--out", f"{temporary}/run"], check=False).returncode:
            raise InputError("", "the demo does not train; see above")


if __name__ == "__main__":
    run_command(main)
