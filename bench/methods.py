"""What each method draws of the digits, in minutes: a picture, its reading by two judges, and its time.

python -m bench.methods                      # those that compare features, into docs/methods/ and bench/results/
python -m bench.methods --only mmd frechet   # these again; the rows of the others stay as they are
python -m bench.methods --runs critics       # instead: published recipes with a critic
python -m bench.methods --runs codes         # methods that learn codes of the real images
python -m bench.methods --runs imagenet      # ImageNet features, matched by two methods

The judges have seen no method: a support vector machine on real 8×8 digits (`bench.digit_judge`), and the kernel
distance of EfficientNet-Lite0's ImageNet features. Where it is these features that are matched (`--runs imagenet`), the
second judge is the demo's own network, which was pretrained on the digits. `python -m bench.pages` writes the rows into
docs/methods.md and docs/games.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.commands import Usage, check, interruptible, run_module
from bench.digit_judge import INK, DigitJudge, chroma, edge_level
from bench.rows import Row, environment, newest_file, print_rows, read_json, write_json
from engine.comparison.distances.nearest import nearest_rows
from engine.configuration.build import pretrained_files
from engine.configuration.command import Parser, run_command
from engine.configuration.config import Config
from engine.configuration.inputs import choose_device, load_run_sampler, open_data
from engine.configuration.published import PUBLISHED
from engine.evaluation.judges import EvaluationNetwork, evaluation_network
from engine.evaluation.metrics import KID_SUBSET, compute_metrics
from engine.support.errors import InputError
from engine.support.pixels import pixel_grid, save_png
from engine.training.run_folder import RunFolder
from pipelines import read_pixels

ROOT = Path(__file__).parents[1]
JUDGE = "efficientnet-lite0"
_MATCHED = ("--extractor", JUDGE, "--weights", "imagenet", "--steps", "500")
RUNS: dict[str, dict[str, tuple[str, ...]]] = {
    "comparing": {
        "gfmn": (),
        "gfmn-ema": ("--population", "ema"),
        **{name: ("--method", name) for name in ("mmd", "frechet", "sinkhorn", "drifting", "gmmn", "gmmn-ae")},
    },
    "critics": {name: ("--preset", name) for name in PUBLISHED},
    "codes": {
        **{name: ("--method", name) for name in ("ae", "vae")},
        "wae-mmd": ("--method", "wae"),
        "wae-gan": ("--method", "wae", "--divergence", "gan"),
        **{name: ("--method", name) for name in ("glo", "imle", "glann")},
    },
    "imagenet": {
        "imagenet-gfmn": _MATCHED,
        "imagenet-frechet": (*_MATCHED, "--method", "frechet", "--pool", "grid2"),
    },
}
"""`--runs` → name of the picture → flags of engine.train; where no preset is named, that of the digits."""
KINDS = {
    "comparing": "methods_digits",
    "critics": "critics_digits",
    "codes": "codes_digits",
    "imagenet": "methods_imagenet",
}
"""`--runs` → what its file of rows begins with."""
SAMPLES, SHOWN, COLUMNS = 1_797, 48, 16
"""Samples that are judged, as many as there are real digits; samples in the picture, and in a row of it."""


_BLOCK = 8_192
"""Images that are looked at at a time."""
_OF_NETWORK = ("kernel_distance", "frechet_distance", "precision", "recall", "classifier_score")


@dataclass(frozen=True, kw_only=True)
class MethodRow(Row):
    """One method on the digits.

    Attributes:
        name: of the run and of its picture.
        flags: what was given to engine.train.
        summary: what is compared, in the engine's words.
        steps, minibatch: of the training.
        seconds: of the whole command, the extractor's pretraining left out.
        cpu_seconds: the same of all threads together; a busy machine makes it little longer.
        mebibytes: the most that the process held.
        confident: share of the samples that the first judge reads with confidence.
        least_share, largest_share: of the ten digits among the samples.
        least_variety, largest_variety: of the ten, pixel deviation within a class over the real digits'.
        chroma: colour on ink, of 255; the distance to that of the real images, and real digits have 0.
        edge_level: of the outermost pixels, of 255; the distance to that of the real images, and real digits have 0.
        kernel_distance, frechet_distance, precision, recall: to all real images, by the second judge.
        classifier_score: the second judge's too, where it is a classifier: the Inception score.
        distinct: how many of the real images are the nearest one (pixels) to some sample.
        judge: the second judge's network; None for `JUDGE`.
        scale, seed, budget, smoke: of `bench.paper`: the data set, the run's seed, seconds of training that were given
            to every method, and whether its numbers mean nothing.
        settings, preset_steps: of `bench.paper`: digest of all settings of the run, and its preset's training steps.
        device, training_threads: of `bench.paper`: what the run was computed on, None is a CPU; and with how many
            threads, None: not recorded.
    """

    name: str
    flags: str
    summary: str
    steps: int
    minibatch: int
    seconds: float
    chroma: float
    kernel_distance: float
    confident: float | None = None
    least_share: float | None = None
    largest_share: float | None = None
    least_variety: float | None = None
    largest_variety: float | None = None
    edge_level: float | None = None
    frechet_distance: float | None = None
    precision: float | None = None
    recall: float | None = None
    classifier_score: float | None = None
    cpu_seconds: float | None = None
    mebibytes: float | None = None
    distinct: int | None = None
    judge: str | None = None
    scale: str | None = None
    seed: int | None = None
    budget: int | None = None
    smoke: bool | None = None
    settings: str | None = None
    preset_steps: int | None = None
    device: str | None = None
    training_threads: int | None = None


def run(name: str, flags: Sequence[str], folder: Path, picture: Path, imagenet: bool = False) -> MethodRow:
    """Train, draw and judge; samples go to `picture`. `imagenet`: `JUDGE` is what is matched, and so another judges."""
    path = folder / name
    command = [*flags, *(() if "--preset" in flags else ("--preset", "digits")), "--out", str(path)]
    ended = run_module("engine.train", command, shown=True)
    check(ended, f"{name}: python -m engine.train")
    network = _demo_network() if imagenet else None
    row = judged(name, flags, path, ended.usage, network, judge=network.label if network else None)
    draw(path, picture)
    return row


def judged(
    name: str,
    flags: Sequence[str],
    path: Path,
    usage: Usage,
    network: EvaluationNetwork | None = None,
    *,
    count: int = SAMPLES,
    metrics: Sequence[str] = ("fid", "kid", "prc"),
    real_cache: Path | None = None,
    **more: Any,
) -> MethodRow:
    """The row of the finished run in the folder `path`.

    Args:
        name, flags: of the run.
        usage: of its training.
        network: the second judge; None is `JUDGE`.
        count: samples that are judged.
        metrics: that the second judge computes, "kid" among them.
        real_cache: see `compute_metrics`.
        more: other fields of the row.
    """
    config = Config.load(RunFolder(path).config)
    device = choose_device(config.training.device)
    real = read_pixels(open_data(config))
    network = network or evaluation_network(JUDGE, image_size=config.data.image_size)
    samples = load_run_sampler(path).to(device).draw_pixels(count, seed=_unseen(config))
    return MethodRow(
        name=name,
        flags=" ".join(flags),
        summary=config.summary,
        steps=config.training.steps,
        minibatch=config.training.batch_size,
        seconds=usage.seconds,
        cpu_seconds=usage.cpu_seconds,
        mebibytes=usage.mebibytes,
        environment=environment(device),
        **measure(samples, real, network, metrics, device, config.data.dataset == "digits", real_cache),
        **more,
    )


def _unseen(config: Config) -> int:
    """A seed whose z are not those of the run's minibatches."""
    return config.training.seed + 1


def measure(
    samples: Tensor,
    real: Tensor,
    network: EvaluationNetwork,
    metrics: Sequence[str],
    device: torch.device,
    digits: bool,
    real_cache: Path | None = None,
) -> dict[str, Any]:
    """The fields of a `MethodRow` that say what `samples`, uint8 [N, 3, H, W], are worth beside all `real` images."""
    subset = min(KID_SUBSET, len(samples), len(real))
    found = compute_metrics(
        samples, real, network, metrics, device=device, kid_subset_size=subset, real_cache=real_cache
    )
    return {
        **(_read(_pixels(samples)) if digits else {}),
        "chroma": abs(_mean(samples, chroma, _ink) - _mean(real, chroma, _ink)),
        "edge_level": abs(_mean(samples, edge_level, len) - _mean(real, edge_level, len)),
        "distinct": distinct_neighbours(samples, real, device),
        **{key: found[key] for key in _OF_NETWORK if key in found},
    }


def _pixels(images: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3] of images uint8 [N, 3, H, W]."""
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _mean(images: Tensor, measured: Callable[[np.ndarray], float], weight: Callable[[np.ndarray], int]) -> float:
    """`measured` of all images, from blocks of them: its mean with the weights of the blocks."""
    total, weights = 0.0, 0
    for block in map(_pixels, images.split(_BLOCK)):
        total += measured(block) * weight(block)
        weights += weight(block)
    return total / max(weights, 1)


def _ink(pixels: np.ndarray) -> int:
    return int((pixels.max(axis=3) > INK).sum())


def distinct_neighbours(samples: Tensor, real: Tensor, device: torch.device) -> int:
    """How many of the `real` images are the nearest one, in pixels, to some sample; a block at a time is float32."""
    found = torch.zeros(len(real), dtype=torch.bool)
    for rows in samples.split(_BLOCK):
        x = rows.to(device).flatten(1).float()
        best = torch.full((len(x),), float("inf"), device=device)
        nearest = torch.zeros(len(x), dtype=torch.int64, device=device)
        for number, block in enumerate(real.split(_BLOCK)):
            index, squares = nearest_rows(x, block.to(device).flatten(1).float())
            nearest = torch.where(squares < best, index + number * _BLOCK, nearest)
            best = torch.minimum(best, squares)
        found[nearest.cpu()] = True
    return int(found.sum())


def _read(pixels: Any) -> Mapping[str, float]:
    """What the first judge says of digits uint8 [N, 32, 32, 3]."""
    verdict = DigitJudge().judge(pixels)
    return {
        "confident": verdict.confident,
        "least_share": float(verdict.shares.min()),
        "largest_share": float(verdict.shares.max()),
        "least_variety": float(verdict.deviation_ratios.min()),
        "largest_variety": float(verdict.deviation_ratios.max()),
    }


def draw(path: Path, picture: Path) -> None:
    """The first samples of the run in the folder `path`, as a PNG."""
    config = Config.load(RunFolder(path).config)
    samples = load_run_sampler(path).to(choose_device(config.training.device)).draw_pixels(SHOWN, seed=_unseen(config))
    save_png(picture, pixel_grid(samples.permute(0, 2, 3, 1).contiguous().cpu(), COLUMNS))


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
    add("--runs", choices=tuple(RUNS), default="comparing", help="which runs; see above")
    add("--only", nargs="+", metavar="NAME", help="some of them")
    add("--docs", type=Path, metavar="DIR", help="of the pictures (default: docs/methods)")
    add("--json", type=Path, metavar="FILE", help="the rows (default: one of the day in bench/results/, which begins "
        "with those of the newest); those of runs that are not made again stay")  # fmt: skip
    add("--steps", type=int, metavar="N", help="in place of the preset's, to try the command; needs --docs and --json")
    arguments = parser.parse_args(argv)
    runs = RUNS[arguments.runs]
    chosen = arguments.only or tuple(runs)
    if unknown := [name for name in chosen if name not in runs]:
        parser.error(f"--only: {unknown[0]} is none of the runs of --runs {arguments.runs} ({', '.join(runs)})")
    if arguments.steps is not None and None in (arguments.docs, arguments.json):
        parser.error("--steps: give --docs and --json as well, so that no published picture or row is replaced")
    more = () if arguments.steps is None else ("--steps", str(arguments.steps))
    docs = arguments.docs or ROOT / "docs/methods"
    kind = KINDS[arguments.runs]
    results = ROOT / "bench/results"
    file = arguments.json or results / f"{kind}_{time.strftime('%Y-%m-%d')}.json"
    before = rows_before(file, None if arguments.json else newest_file(results, kind), runs)
    docs.mkdir(parents=True, exist_ok=True)
    rows: dict[str, MethodRow] = {row.name: row for row in before}
    with interruptible(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pretrain()
        for name in chosen:
            rows[name] = run(name, (*runs[name], *more), folder, docs / f"{name}.png", arguments.runs == "imagenet")
            write_json(file, [rows[known] for known in runs if known in rows])
    print_rows([rows[name] for name in chosen])


def rows_before(file: Path, newest: Path | None, names: Collection[str]) -> list[MethodRow]:
    """Those of `names` in `file` if it is there, else in the `newest`; of runs that are no more nothing is kept.

    InputError if it holds anything else than rows of methods, or those of other runs, which would be lost.
    """
    found = file if file.exists() else newest
    if found is None:
        return []
    try:
        rows = read_json(found, MethodRow)
    except (OSError, TypeError, ValueError) as error:
        raise InputError("json", f"{found} holds no rows of methods ({error}); give another file") from None
    others = {name for runs in RUNS.values() for name in runs}.difference(names)
    if foreign := [row.name for row in rows if row.name in others or row.seed is not None]:
        raise InputError("json", f"{found} holds rows of other runs ({foreign[0]}); give another file")
    return [row for row in rows if row.name in names]


def pretrain(seeds: Iterable[int] = (0,)) -> None:
    """Leave each seed's extractor and target in the cache, so that the first run's time is as the others'."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as temporary:
            command = ["--preset", "digits", "--steps", "1", "--seed", str(seed), "--out", f"{temporary}/run"]
            check(run_module("engine.train", command, shown=True), "the extractor: python -m engine.train")


if __name__ == "__main__":
    run_command(main)
