"""The page: what the sections of `templates/report.html` show, in their order."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from engine.configuration.config import Config
from engine.generation.saved import SavedSampler
from engine.reporting.charts import Chart, histogram_chart, number
from engine.reporting.codes import codes_section
from engine.reporting.judges import judges_compared
from engine.reporting.neighbours import NearestImages, nearest_images
from engine.reporting.numbers import evaluation_tables, is_number, logged_charts
from engine.reporting.pictures import as_picture, as_png, data_uri, largest_side, samples_over_time, upper_left
from engine.reporting.real import RealImages
from engine.reporting.settings import configuration_lines, versions
from engine.support.pixels import grid
from engine.training.run_folder import COLUMNS, RunFolder
from pipelines import DataError, read_numbered

log = logging.getLogger("gfmn")

_PATHS = 6  # rows of interpolations
_COMPARED = 256  # samples whose nearest real images are looked for
_FIRST, _CLOSEST = 6, 6  # of them are shown: the first ones, and the closest of the others
_SMALL = 96  # pixels of a larger image beside its neighbours
_GRID_BYTES = 600_000  # of one grid


def render(
    *,
    title: str,
    sampler: SavedSampler,
    config: Config,
    command: str,
    run: RunFolder,
    real: RealImages,
    seed: int,
    limit: int,
) -> str:
    """The report as one HTML page without other files.

    Args:
        title: of the page.
        sampler, config, run: of the run.
        command: the command line that repeats the run.
        real: from `open_real`.
        seed: of the z that the samples and interpolations are drawn from, and of the choice of real images.
        limit: the most real images that samples are compared with.
    """
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
    pixels = numbers = None
    if real.space is not None or sampler.knows_codes:
        real, pixels, numbers = _read(real, config, seed, limit)
    final = as_picture(grid(sampler.draw(COLUMNS**2, seed), COLUMNS))
    rows = _PATHS if size <= 64 else _PATHS // 2
    paths = as_picture(grid(sampler.draw_paths(rows, COLUMNS, seed + 1), COLUMNS))
    return environment.get_template("report.html").render(
        title=title,
        facts=_facts(sampler, config, real, metrics),
        step=sampler.step,
        seed=seed,
        size=size,
        scale=max(1, min(3, 64 // size)),
        final=upper_left(final, size, largest_side([final], size, _GRID_BYTES, (8, 6, 4, 3)) or 2),
        steps=samples_over_time(run, size),
        paths=upper_left(paths, size),
        losses=logged_charts(metrics),
        judges=judges_compared(metrics),
        evaluations=evaluation_tables(metrics),
        neighbours=_neighbours(sampler, real, pixels, seed),
        codes=codes_section(sampler, real, pixels, numbers, seed),
        preset=config.preset,
        groups=configuration_lines(config),
        command=command,
        versions=versions(),
        written=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def _facts(sampler: SavedSampler, config: Config, real: RealImages, metrics: list[dict[str, Any]]) -> list[str]:
    networks, training = config.networks, config.training
    origin = {("pretrain",): "pretrained", ("random",): "random weights", ("imagenet",): "ImageNet weights"}
    extractor = networks.extractor + (f" ({origin[networks.weights]})" if networks.weights in origin else "")
    if real.num_features is not None:
        extractor += f", {number(real.num_features)} features"
    images = f"{number(len(real.dataset))} images of " if real.dataset is not None else ""
    taken, planned = sampler.step, training.steps
    facts = [
        f"{networks.generator} generator",
        f"matched to {extractor}" if config.needs.features else config.method.method,
        f"{config.data.dataset}, {images}{config.data.image_size}×{config.data.image_size}",
        f"step {number(taken)}" + (f" of {number(planned)}" if taken < planned else ""),
        f"minibatch {number(training.batch_size)}",
        config.summary,
    ]
    if training.device != "auto":
        facts.append(training.device)
    seconds = _seconds(metrics, training.batch_size)
    if seconds:
        rate = metrics[-1]["step"] * training.batch_size / seconds
        facts.append(f"{_duration(seconds)} of training, {number(round(rate))} images/s")
    return facts


def _seconds(metrics: list[dict[str, Any]], batch_size: int) -> float:
    """Seconds of all logged steps, from their rates; 0 if a rate is missing."""
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
class _Match:
    """One sample beside its nearest real images.

    Attributes:
        sample: PNG.
        neighbours: (PNG, distance) of each, nearest first.
        farther: the share of real images that are farther from their own nearest neighbour.
    """

    sample: bytes
    neighbours: list[tuple[bytes, str]]
    farther: str


@dataclass(frozen=True)
class _NeighboursSection:
    """What the section "Nearest real images" shows; only `missing`, the reason, if it is left out."""

    missing: str | None = None
    sentence: str = ""
    copies: int = 0
    first: list[_Match] = dataclasses.field(default_factory=list)
    closest: list[_Match] = dataclasses.field(default_factory=list)
    chart: Chart | None = None
    quantile_5: str = ""
    median: str = ""
    features: str = ""
    compared: int = 0
    real: int = 0
    total: int = 0
    changed: tuple[str, ...] = ()


def _read(real: RealImages, config: Config, seed: int, limit: int) -> tuple[RealImages, Tensor | None, Tensor | None]:
    """At most `limit` real images and their places in the data set; None if they can't be read, which `real` says."""
    if real.dataset is None:
        return real, None, None
    try:
        return real, *read_numbered(real.dataset, limit=limit, seed=seed, backend=config.data.loader)
    except DataError as error:
        log.warning("no nearest real images in the report: %s", error)
        return dataclasses.replace(real, space=None, missing=str(error)), None, None


def _neighbours(sampler: SavedSampler, real: RealImages, images: Tensor | None, seed: int) -> _NeighboursSection:
    if real.dataset is None or real.space is None or images is None:
        return _NeighboursSection(missing=real.missing)
    samples = sampler.draw_pixels(_COMPARED, seed)
    if len(images) < 2:
        return _NeighboursSection(missing="the data set has a single image")
    found = nearest_images(samples, images, real.space.features)
    others = found.distances[_FIRST:, 0].argsort()[:_CLOSEST] + _FIRST
    return _NeighboursSection(
        sentence=closeness(found),
        copies=found.num_copies,
        first=[_match(found, index) for index in range(_FIRST)],
        closest=[_match(found, index) for index in others.tolist()],
        chart=histogram_chart(
            "Distance to the nearest real image, % of images",
            {
                "real images, to another one": found.yardstick.tolist(),
                "samples": found.distances[:, 0].tolist(),
            },
            marks={"5%": found.quantile(0.05), "median": found.quantile(0.5)},
            x_label="distance",
        ),
        quantile_5=number(found.quantile(0.05)),
        median=number(found.quantile(0.5)),
        features=real.space.description,
        compared=len(samples),
        real=len(images),
        total=len(real.dataset),
        changed=real.changed,
    )


def closeness(found: NearestImages) -> str:
    """One sentence: how many samples are suspiciously close to a real image, and how many new real ones would be."""
    closer, count = found.num_closer, len(found.samples)
    verb = "is" if closer == 1 else "are"
    return (
        f"{closer or 'None'} of {count} samples {verb} closer to a real image than 95% of real images are to their own "
        f"nearest neighbours; of new real images, one would expect about {round(0.05 * count)}."
    )


def _match(found: NearestImages, index: int) -> _Match:
    def png(pixels: Tensor) -> bytes:
        picture = as_picture(pixels)
        picture.thumbnail((_SMALL, _SMALL))
        return as_png(picture)

    return _Match(
        png(found.samples[index]),
        [
            (png(found.real[neighbour]), f"{distance:.2f}")
            for neighbour, distance in zip(found.indices[index].tolist(), found.distances[index].tolist(), strict=True)
        ],
        f"{100 * float(found.farther[index]):.0f}%",
    )
