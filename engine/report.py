"""`python -m engine.report`: one self-contained HTML page about a run, to look at and to send."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import math
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.assembly import make_extractor, open_data
from engine.charts import Chart, histogram_chart, line_chart, number
from engine.cli import Parser, run_command
from engine.config import PRESETS, Config
from engine.devices import choose_device
from engine.errors import InputError
from engine.files import write_atomically
from engine.images import grid, to_uint8
from engine.neighbours import Comparison, Features, channel_means, compare, real_images
from engine.run_folder import RunFolder
from engine.sampling import RunSampler
from pipelines import DataError, ImageDataset

log = logging.getLogger("gfmn")

_COLUMNS = 8  # of the grids that training writes
_GRIDS = 24
_PATHS = 6
_COMPARED = 256
_FIRST, _CLOSEST = 6, 4
_GRID_BYTES = 600_000  # of one picture
_GRIDS_BYTES = 1_800_000  # of the pictures over time, together
_PACKAGES = ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "numpy", "pillow", "gfmn-engine")
_EVALUATIONS = {
    "frechet_distance": ("FID", "Fréchet distance on {network} features (not FID)"),
    "kernel_distance": ("KID", "kernel distance on {network} features (not KID)"),
    "precision": ("precision", "precision on {network} features"),
    "recall": ("recall", "recall on {network} features"),
}


def parser() -> Parser:
    """The command line."""
    arguments = Parser(
        prog="python -m engine.report",
        description="Write one self-contained HTML page about a run: samples over time, losses, the nearest real "
        "images of some samples, interpolations, the configuration.",
    )
    arguments.add_argument("--run", required=True, metavar="DIR", help="folder of a training run")
    arguments.add_argument("--out", metavar="FILE", help="the page (default: report.html in the run's folder)")
    arguments.add_argument("--title", metavar="TEXT", help="of the page (default: the folder's name)")
    arguments.add_argument("--seed", type=int, default=0, metavar="N", help="of z (default: 0)")
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the extractor")
    arguments.add_argument(
        "--neighbours-of",
        type=int,
        default=10_000,
        metavar="N",
        help="look for the nearest among at most this many real images (default: 10000)",
    )
    arguments.add_argument(
        "--feature-extractor",
        metavar="NAME",
        help="network whose features decide what is near, such as efficientnet-lite0 or inception (default: the "
        "extractor that the run matched)",
    )
    arguments.add_argument("--weights", metavar="FILE", help="of --feature-extractor (default: its own)")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, gather, write."""
    arguments = parser().parse_args(argv)
    if not 0 <= arguments.seed < 2**63:
        raise InputError(f"--seed: must be from 0 to 2^63 − 1, got {arguments.seed}")
    if arguments.neighbours_of < 2:
        raise InputError(f"--neighbours-of: must be at least 2, got {arguments.neighbours_of}")
    run, sampler = RunFolder(arguments.run), RunSampler.load(arguments.run)
    out = Path(arguments.out) if arguments.out is not None else run.path / "report.html"
    if out.is_dir():
        raise InputError(f"--out: {out} is a folder; name a file, such as {out}/report.html")
    config = Config.load(run.config)
    title = arguments.title or run.path.resolve().name
    device = choose_device(arguments.device, config.training.threads)
    if arguments.weights is not None and arguments.feature_extractor is None:
        raise InputError("--weights: are those of --feature-extractor NAME, which is not given")
    space = None
    if arguments.feature_extractor is not None:
        space = chosen_space(arguments.feature_extractor, arguments.weights, config.data.image_size, device)
    real = open_real(run, config, device, space)
    page = render(
        title=title,
        sampler=sampler,
        config=config,
        run=run,
        real=real,
        seed=arguments.seed,
        limit=arguments.neighbours_of,
    )
    write_atomically(out, page.encode())
    log.info("%s: %s of step %d, %.1f MB", out, title, sampler.saved.step, len(page.encode()) / 1e6)


@dataclass(frozen=True)
class Space:
    """Where distances between images are measured: the features, and what they are in words."""

    features: Features
    description: str


def chosen_space(name: str, weights: str | None, image_size: int, device: torch.device) -> Space:
    """The features of an evaluation network; InputError if there is no such network or no weights of it."""
    from engine.metrics import evaluation_network  # torch-fidelity takes a second to import

    network = evaluation_network(None if name == "inception" else name, weights=weights, image_size=image_size)
    return Space(lambda images: network.features(images, device=device), f"the features of {network.label}")


@dataclass(frozen=True)
class Real:
    """The run's dataset, and where its images are compared with samples.

    Attributes:
        dataset, space: None if they could not be had.
        num_features: that were matched, None if that is not known.
        changed: what differs from training, in words.
        missing: why there is nothing to compare with, one line; None if there is.
    """

    dataset: ImageDataset | None = None
    space: Space | None = None
    num_features: int | None = None
    changed: tuple[str, ...] = ()
    missing: str | None = None


def open_real(run: RunFolder, config: Config, device: torch.device, space: Space | None = None) -> Real:
    """Open what the run was trained on; `space` takes the place of its own extractor.

    What can't be opened any more costs a warning, not the page.
    """
    dataset, num_features, changed = None, None, []
    trained = _trained_with(run)
    try:
        dataset = open_data(config)
        if trained.get("data_count", str(len(dataset))) != str(len(dataset)):
            changed.append(f"the data set had {number(int(trained['data_count']))} images in training")
        if space is None:
            # Batch statistics would let the features of an image depend on the others beside it.
            extractor = make_extractor(config.replaced({"extractor_bn": "running"}), dataset, device)
            weights = extractor.fingerprint["extractor_weights"]
            if trained.get("extractor_weights", weights) != weights:
                changed.append("the extractor’s weights are not those of the training")
            num_features = extractor.num_features
            space = Space(
                channel_means(extractor),
                f"the channels of all {len(extractor.taps)} taps of {extractor.name}, averaged over positions",
            )
    except (InputError, DataError) as error:
        missing = " ".join(str(error).split())
        log.warning("%s: no nearest real images in the report: %s", run.path, missing)
        return Real(dataset, missing=missing)
    return Real(dataset, space, num_features, tuple(changed))


def _trained_with(run: RunFolder) -> dict[str, str]:
    """The fingerprint in the newest checkpoint; empty if there is none."""
    try:
        with safe_open(run.checkpoint_paths()[-1], framework="pt") as file:
            return dict(json.loads(file.metadata()["fingerprint"]))
    except (IndexError, KeyError, TypeError, ValueError, OSError, SafetensorError):
        return {}


def render(
    *, title: str, sampler: RunSampler, config: Config, run: RunFolder, real: Real, seed: int, limit: int
) -> str:
    """The page."""
    size = config.data.image_size
    metrics = [entry for entry in run.read_metrics() if isinstance(entry, dict) and _is_number(entry.get("step"))]
    environment = Environment(
        loader=PackageLoader("engine"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["png"] = _data_uri
    environment.filters["number"] = number
    (final,) = fitting([_picture(grid(sampler.draw(_COLUMNS**2, seed), _COLUMNS))], size, _GRID_BYTES)
    paths = _picture(grid(sampler.draw_paths(_PATHS, _COLUMNS, seed + 1), _COLUMNS))
    return environment.get_template("report.html").render(
        title=title,
        facts=_facts(sampler, config, real, metrics),
        step=sampler.saved.step,
        seed=seed,
        size=size,
        scale=max(1, min(3, 64 // size)),
        final=final,
        steps=_steps(run, size),
        paths=Picture(_png(paths), paths.width, paths.height, _PATHS * _COLUMNS, False),
        losses=_loss_charts(metrics),
        evaluations=_evaluations(metrics),
        neighbours=_neighbours(sampler, config, real, seed, limit),
        preset=config.preset,
        groups=_settings(config),
        command=train_command(config),
        versions=_versions(),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )


def _facts(sampler: RunSampler, config: Config, real: Real, metrics: list[dict[str, Any]]) -> list[str]:
    networks, training = config.networks, config.training
    origin = {("pretrain",): "pretrained", ("random",): "random weights", ("imagenet",): "ImageNet weights"}
    extractor = networks.extractor + (f" ({origin[networks.weights]})" if networks.weights in origin else "")
    if real.num_features is not None:
        extractor += f", {number(real.num_features)} features"
    images = f"{number(len(real.dataset))} images of " if real.dataset is not None else ""
    taken, planned = sampler.saved.step, training.steps
    averager = {"ama": "AMA", "ma": "moving average", "none": "no averager"}[config.matching.averager]
    facts = [
        f"{networks.generator} generator",
        f"matched to {extractor}",
        f"{config.data.dataset}, {images}{config.data.image_size}×{config.data.image_size}",
        f"step {number(taken)}" + (f" of {number(planned)}" if taken < planned else ""),
        f"minibatch {number(training.batch_size)}",
        averager,
    ]
    if training.device != "auto":
        facts.append(training.device)
    seconds = _seconds(metrics, training.batch_size)
    if seconds:
        rate = metrics[-1]["step"] * training.batch_size / seconds
        facts.append(f"{_duration(seconds)} of training, {number(round(rate))} images/s")
    return facts


def _seconds(metrics: list[dict[str, Any]], batch_size: int) -> float:
    """What the logged steps took, from their rates; 0 if any of them is missing."""
    total, before = 0.0, 0
    for entry in metrics:
        rate: object = entry.get("images_per_second")
        if not _is_number(rate) or rate <= 0:
            return 0.0
        total += (entry["step"] - before) * batch_size / rate
        before = entry["step"]
    return total


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{number(float(f'{seconds:.2g}'))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Steps:
    """The samples over time: (step, picture), and how many pictures the run's folder has."""

    pictures: list[tuple[int, Picture]]
    available: int


def _steps(run: RunFolder, size: int) -> Steps:
    files = sorted(
        (int(match[1]), path) for path in run.samples.glob("step_*.png") if (match := _STEP.fullmatch(path.name))
    )
    steps, pictures = [], []
    for step, path in evenly(files, _GRIDS):
        try:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
            steps.append(step)
        except OSError:
            log.warning("%s: is not a picture, and left out", path)
    return Steps(list(zip(steps, fitting(pictures, size, _GRIDS_BYTES), strict=True)), len(files))


_STEP = re.compile(r"step_(\d+)\.png")


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, the first and the last among them, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


@dataclass(frozen=True)
class Picture:
    """A grid of images as a PNG.

    Attributes:
        png: its bytes.
        width, height: in pixels.
        count: images in it.
        cut: whether only a part of the grid is left.
    """

    png: bytes
    width: int
    height: int
    count: int
    cut: bool


def fitting(pictures: Sequence[Image.Image], size: int, limit: int) -> list[Picture]:
    """Grids of images of `size` pixels as PNGs of at most `limit` bytes together, if four images each allow that.

    Of grids that are too large, the same upper left rows and columns are kept.
    """
    pitch, fitted = size + 2, []
    for side in (8, 6, 4, 3, 2):
        cut = [p.crop((0, 0, min(side * pitch + 2, p.width), min(side * pitch + 2, p.height))) for p in pictures]
        fitted = [
            Picture(
                _png(new), new.width, new.height, (new.width // pitch) * (new.height // pitch), new.size != old.size
            )
            for old, new in zip(pictures, cut, strict=True)
        ]
        if sum(len(picture.png) for picture in fitted) <= limit:
            break
    return fitted


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _series(metrics: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in metrics if _is_number(entry.get(name))]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _loss_charts(metrics: list[dict[str, Any]]) -> list[Chart]:
    parts = {"loss": "loss", "loss_mean": "over means", "loss_variance": "over variances"}
    rates = _series(metrics, "lr")
    charts = [
        line_chart("Loss", {label: _series(metrics, name) for name, label in parts.items()}),
        line_chart(
            "‖Δ‖, distance of the moments to the target",
            {"": _series(metrics, "difference_norm")},
            log=True,
        ),
        line_chart("Images per second", {"": _series(metrics, "images_per_second")}),
        line_chart("Learning rate", {"": rates}) if len({rate for _, rate in rates}) > 1 else None,
    ]
    return [chart for chart in charts if chart is not None]


@dataclass(frozen=True)
class Evaluation:
    """The evaluations of one network: columns and rows of a table, and a chart for each number."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    charts: list[Chart]


def _evaluations(metrics: list[dict[str, Any]]) -> list[Evaluation]:
    found: dict[tuple[str, bool], list[tuple[int, dict[str, Any]]]] = {}
    for entry in metrics:
        values = entry.get("evaluation")
        if isinstance(values, dict):
            key = str(values.get("network", "unknown")), bool(values.get("is_inception"))
            found.setdefault(key, []).append((entry["step"], values))
    return [_evaluation(network, inception, rows) for (network, inception), rows in found.items()]


def _evaluation(network: str, inception: bool, entries: list[tuple[int, dict[str, Any]]]) -> Evaluation:
    names = [name for name in _EVALUATIONS if any(_is_number(values.get(name)) for _, values in entries)]
    labels = {name: _EVALUATIONS[name][0 if inception else 1].format(network=network) for name in names}
    rows = []
    for step, values in entries:
        cells = [number(values[name]) if _is_number(values.get(name)) else "–" for name in names]
        if "kernel_distance" in names and _is_number(values.get("kernel_distance_std")):
            cells[names.index("kernel_distance")] += f" ± {number(values['kernel_distance_std'])}"
        samples: object = values.get("samples")
        rows.append([number(step), number(samples) if _is_number(samples) else "–", *cells])
    charts = [
        line_chart(
            labels[name][0].upper() + labels[name][1:],
            {"": [(step, values[name]) for step, values in entries if _is_number(values.get(name))]},
        )
        for name in names
    ]
    title = "Inception features" if inception else f"{network} features"
    shown = [chart for chart in charts if chart is not None] if len(entries) > 1 else []
    return Evaluation(title, ["step", "samples", *labels.values()], rows, shown)


@dataclass(frozen=True)
class Row:
    """One sample beside its nearest real images: (PNG, distance) each."""

    sample: bytes
    neighbours: list[tuple[bytes, str]]
    farther: str


@dataclass(frozen=True)
class Neighbours:
    """The section on copies, or why there is none."""

    missing: str | None = None
    sentence: str = ""
    copies: int = 0
    first: list[Row] = dataclasses.field(default_factory=list)
    closest: list[Row] = dataclasses.field(default_factory=list)
    chart: Chart | None = None
    quantile_5: str = ""
    median: str = ""
    features: str = ""
    compared: int = 0
    real: int = 0
    total: int = 0
    changed: tuple[str, ...] = ()


def _neighbours(sampler: RunSampler, config: Config, real: Real, seed: int, limit: int) -> Neighbours:
    if real.dataset is None or real.space is None:
        return Neighbours(missing=real.missing)
    samples = to_uint8(sampler.draw(_COMPARED, seed)).permute(0, 3, 1, 2).contiguous()
    try:
        images = real_images(real.dataset, limit, seed=seed, loader=config.data.loader)
    except DataError as error:
        log.warning("no nearest real images in the report: %s", error)
        return Neighbours(missing=str(error))
    if len(images) < 2:
        return Neighbours(missing="the data set has a single image")
    comparison = compare(samples, images, real.space.features)
    others = comparison.distances[_FIRST:, 0].argsort()[:_CLOSEST] + _FIRST
    return Neighbours(
        sentence=closeness(comparison),
        copies=comparison.num_copies,
        first=[_row(comparison, index) for index in range(_FIRST)],
        closest=[_row(comparison, index) for index in others.tolist()],
        chart=histogram_chart(
            "Distance to the nearest real image, % of images",
            {
                "real images, to another one": comparison.yardstick.tolist(),
                "samples": comparison.distances[:, 0].tolist(),
            },
            marks={"5%": comparison.quantile(0.05), "median": comparison.quantile(0.5)},
            x_label="distance",
        ),
        quantile_5=number(comparison.quantile(0.05)),
        median=number(comparison.quantile(0.5)),
        features=real.space.description,
        compared=len(samples),
        real=len(images),
        total=len(real.dataset),
        changed=real.changed,
    )


def closeness(comparison: Comparison) -> str:
    """How many samples are suspiciously close to a real image, in one sentence."""
    closer, count = comparison.num_closer, len(comparison.samples)
    verb = "is" if closer == 1 else "are"
    return (
        f"{closer or 'None'} of {count} samples {verb} closer to a real image than 95% of real images are to their own "
        f"nearest neighbours; of new real images, one would expect about {round(0.05 * count)}."
    )


def _row(comparison: Comparison, index: int) -> Row:
    def png(pixels: Tensor) -> bytes:
        return _png(_picture(pixels))

    return Row(
        png(comparison.samples[index]),
        [
            (png(comparison.real[neighbour]), f"{distance:.2f}")
            for neighbour, distance in zip(
                comparison.indices[index].tolist(), comparison.distances[index].tolist(), strict=True
            )
        ],
        f"{100 * float(comparison.farther[index]):.0f}%",
    )


@dataclass(frozen=True)
class Setting:
    """A line of the configuration; `default` is the preset's value where the run has another one."""

    name: str
    value: str
    default: str | None


def _settings(config: Config) -> dict[str, list[Setting]]:
    usual = Config.build(config.preset, {}) if config.preset in PRESETS else config
    groups = {}
    for name, values in dataclasses.asdict(config).items():
        if isinstance(values, dict):
            defaults = dataclasses.asdict(getattr(usual, name))
            groups[name] = [
                Setting(key, _shown(value), _shown(defaults[key]) if defaults[key] != value else None)
                for key, value in values.items()
            ]
    return groups


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == ():
        return "–"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def train_command(config: Config) -> str:
    """The command that trains the same again: the preset, and a flag for every value that is not the preset's."""
    words = ["python", "-m", "engine.train", "--preset", config.preset]
    usual, own = Config.build(config.preset, {}).flat() if config.preset in PRESETS else {}, config.flat()
    for name, value in own.items():
        if name in usual and usual[name] == value:
            continue
        flag = "--" + name.replace("_", "-")
        if value is None or value == ():
            return "python -m engine.train --config config.json"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words.append(f"{flag}={value}" if str(value).startswith("-") else flag)
            words += [] if str(value).startswith("-") else [str(value)]
    return shlex.join(words)


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    run_command(main)
