"""The page itself: sections in the order of the template, `templates/report.html`."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from engine.configuration.config import Config
from engine.generation.sampling import RunSampler
from engine.reporting.charts import Chart, histogram_chart, number
from engine.reporting.neighbours import Comparison, compare
from engine.reporting.numbers import evaluations, is_number, loss_charts
from engine.reporting.pictures import COLUMNS, as_picture, as_png, data_uri, largest_side, sample_steps, upper_left
from engine.reporting.real import Real
from engine.reporting.settings import settings, train_command, versions
from engine.support.pixels import grid
from engine.training.run_folder import RunFolder
from pipelines import DataError, read_pixels

log = logging.getLogger("gfmn")

_PATHS = 6
_COMPARED = 256
_FIRST, _CLOSEST = 6, 6
_SMALL = 96  # pixels of a larger image beside its neighbours
_GRID_BYTES = 600_000  # of one picture


def render(
    *, title: str, sampler: RunSampler, config: Config, run: RunFolder, real: Real, seed: int, limit: int
) -> str:
    """The page."""
    size = config.data.image_size
    metrics = [entry for entry in run.read_metrics() if isinstance(entry, dict) and is_number(entry.get("step"))]
    environment = Environment(
        loader=PackageLoader("engine.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = data_uri
    environment.filters["number"] = number
    final = as_picture(grid(sampler.draw(COLUMNS**2, seed), COLUMNS))
    rows = _PATHS if size <= 64 else _PATHS // 2
    paths = as_picture(grid(sampler.draw_paths(rows, COLUMNS, seed + 1), COLUMNS))
    return environment.get_template("report.html").render(
        title=title,
        facts=_facts(sampler, config, real, metrics),
        step=sampler.saved.step,
        seed=seed,
        size=size,
        scale=max(1, min(3, 64 // size)),
        final=upper_left(final, size, largest_side([final], size, _GRID_BYTES, (8, 6, 4, 3)) or 2),
        steps=sample_steps(run, size),
        paths=upper_left(paths, size),
        losses=loss_charts(metrics),
        evaluations=evaluations(metrics),
        neighbours=_neighbours(sampler, config, real, seed, limit),
        preset=config.preset,
        groups=settings(config),
        command=train_command(config),
        versions=versions(),
        written=datetime.now(UTC).strftime("%Y-%m-%d"),
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
        if not is_number(rate) or rate <= 0:
            return 0.0
        total += (entry["step"] - before) * batch_size / rate
        before = entry["step"]
    return total


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{number(float(f'{seconds:.2g}'))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
    samples = sampler.draw_pixels(_COMPARED, seed)
    try:
        images = read_pixels(real.dataset, limit=limit, seed=seed, backend=config.data.loader)
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
        picture = as_picture(pixels)
        picture.thumbnail((_SMALL, _SMALL))
        return as_png(picture)

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
