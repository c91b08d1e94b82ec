"""From rows to a table, findings and a figure: every number in them is computed here, from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from scipy.stats import t as student

from bench.methods import MethodRow
from bench.paper.experiments import EXPERIMENTS, SCALES, Claim
from bench.paper.runs import RunRow
from bench.rows import read_json, save_figure, table
from engine.configuration.inputs import load_run_sampler
from engine.support.errors import InputError
from engine.support.pixels import grid

DISTANCES = ("kernel_distance", "frechet_distance")
_INCEPTION_NAMES = {
    "kernel_distance": "KID · 1000",
    "frechet_distance": "FID",
    "pixel_distance": "energy distance of pixels · 1000",
    "classifier_score": "IS",
    "precision": "precision",
    "recall": "recall",
}
_OTHER_NAMES = {
    "kernel_distance": "kernel distance · 1000",
    "frechet_distance": "Fréchet distance",
    "pixel_distance": "energy distance of pixels · 1000",
    "classifier_score": "classifier score",
    "precision": "precision",
    "recall": "recall",
}
_CONFIDENCE = 0.95
_THOUSANDTHS = ("kernel_distance", "pixel_distance")


@dataclass(frozen=True)
class Summary:
    """A number's mean and deviation (N − 1) over seeds."""

    mean: float
    deviation: float
    count: int

    def __str__(self) -> str:
        digits = 3 if abs(self.mean) < 10 else 1
        spread = f" ± {self.deviation:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:.{digits}f}{spread}"


def summarise(values: Sequence[float]) -> Summary:
    """Mean and deviation; the deviation of one value is 0."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Summary(float(np.mean(values)), deviation, len(values))


def of_setting(rows: Sequence[RunRow], setting: str, metric: str) -> list[float]:
    """The metric's values, a seed each; kernel distances and those of pixels in thousandths."""
    factor = 1000 if metric in _THOUSANDTHS else 1
    return [factor * row.metrics[metric] for row in rows if row.setting == setting]


def settings_of(rows: Sequence[RunRow]) -> list[str]:
    """Settings in the order of the experiment, whichever seeds they have."""
    if not rows:
        return []
    order = [setting.name for setting in EXPERIMENTS[rows[0].experiment].settings(SCALES[rows[0].scale])]
    return sorted(dict.fromkeys(row.setting for row in rows), key=lambda name: (*order, name).index(name))


def results_table(rows: Sequence[RunRow]) -> str:
    """A line a setting: mean and deviation over the seeds of everything that was measured."""
    names = _INCEPTION_NAMES if rows[0].is_inception else _OTHER_NAMES
    metrics = [metric for metric in names if metric in rows[0].metrics]
    lines = []
    for setting in settings_of(rows):
        seconds = [row.seconds for row in rows if row.setting == setting]
        numbers = [str(summarise(of_setting(rows, setting, metric))) for metric in metrics]
        lines.append([setting, *numbers, len(seconds), f"{np.median(seconds):.0f}"])
    return table(["setting", *(names[metric] for metric in metrics), "seeds", "seconds a run"], lines)


def closer(
    rows: Sequence[RunRow], one: str, other: str, metric: str = "kernel_distance"
) -> tuple[int, Summary, Summary]:
    """1 if the setting `one` has the smaller mean distance, −1 if `other` has, 0 if that is undecided."""
    first, second = (summarise(of_setting(rows, name, metric)) for name in (one, other))
    return smaller(first, second), first, second


def smaller(first: Summary, second: Summary) -> int:
    """1 if the first mean is the smaller one, −1 if the second is, 0 if that is undecided.

    By Welch's t-test, two-sided at 95%: |x̄₁ − x̄₂| > t · √(e₁ + e₂), where eᵢ = sᵢ²/nᵢ, and t is of
    (e₁ + e₂)² / (e₁²/(n₁−1) + e₂²/(n₂−1)) degrees of freedom (Welch 1947; Satterthwaite 1946).
    """
    if min(first.count, second.count) < 2:
        return 0
    squares = [found.deviation**2 / found.count for found in (first, second)]
    difference, needed = second.mean - first.mean, 0.0
    if any(squares):
        weights = [square**2 / (found.count - 1) for square, found in zip(squares, (first, second))]
        freedom = sum(squares) ** 2 / sum(weights)
        needed = float(student.ppf((1 + _CONFIDENCE) / 2, freedom)) * sum(squares) ** 0.5
    return 0 if not abs(difference) > needed else 1 if difference > 0 else -1  # undecided too if one is not a number


def next_to(names: Mapping[str, Summary]) -> str:
    """A part of a sentence: which name has the smallest mean, and which the next one. No test, which would be of names
    that were chosen by what is tested."""
    (one, first), *rest = sorted(names.items(), key=lambda pair: pair[1].mean)
    if not rest:
        return f"{one} is closest ({first}), and alone"
    other, second = rest[0]
    return f"{one} is closest ({first}), then {other} ({second})"


WORDS = {1: "agrees", -1: "disagrees", 0: "undecided"}
"""What `smaller` says of a claim."""


def verdict(rows: Sequence[RunRow], claim: Claim, metric: str = "kernel_distance") -> str:
    """A sentence: does the claim hold here, by `closer`?"""
    sign, better, worse = closer(rows, claim.better, claim.worse, metric)
    judge = "" if metric == "kernel_distance" else f", by the {_OTHER_NAMES[metric].removesuffix(' · 1000')}"
    return f"{claim.text}{judge}: **{WORDS[sign]}** ({claim.better} {better}, {claim.worse} {worse})"


def side_by_side(rows: Sequence[RunRow]) -> str:
    """A sentence on two settings of which the paper claims nothing."""
    one, other = settings_of(rows)
    sign, first, second = closer(rows, one, other)
    word = {1: f"{one} is closer", -1: f"{other} is closer", 0: f"**{WORDS[0]}**"}[sign]
    return f"{one} against {other}: {word} ({one} {first}, {other} {second})"


def correlations(rows: Sequence[RunRow]) -> list[str]:
    """Sentences on whether the loss and ‖Δ‖ order the evaluations of a run as the kernel distance does.

    Spearman's rank correlation for each seed. Their mean is against 0, by Student's t-test, two-sided at 95%, which is
    `smaller` with a mean that has no spread.
    """
    lines = []
    for key, name in (("loss", "the loss"), ("difference_norm", "‖Δ‖, the distance of the moments,")):
        values = [
            float(spearmanr([point[key] for point in row.curve], [point["kernel_distance"] for point in row.curve])[0])
            for row in rows
        ]
        found = summarise(values)
        word = WORDS[smaller(Summary(0.0, 0.0, found.count), found)]
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append(
            f"{name} falls with the held-out kernel distance: **{word}** (mean rank correlation {found.mean:.2f}; of "
            f"the seeds: {each})"
        )
    return lines


def closest(rows: Sequence[RunRow]) -> list[str]:
    """A sentence for each minibatch: the setting with the smallest mean kernel distance, and the next one."""
    sentences = []
    for minibatch in sorted({row.minibatch for row in rows}):
        own = [row for row in rows if row.minibatch == minibatch]
        means = {name: summarise(of_setting(own, name, "kernel_distance")) for name in settings_of(own)}
        if len(means) > 1:
            sentences.append(f"at minibatch {minibatch}, {next_to(means)}")
    return sentences


def trend(rows: Sequence[RunRow]) -> str:
    """A sentence on the rank correlation of the settings' order with the kernel distance."""
    names = settings_of(rows)
    means = [summarise(of_setting(rows, name, "kernel_distance")).mean for name in names]
    value = float(spearmanr(range(len(names)), means)[0])
    return f"rank correlation of the number of layers with the mean kernel distance: {value:.2f} (−1: more is better)"


def tested(rows: Sequence[RunRow]) -> list[str]:
    """What the tests say of the paper's claims, or of two settings, a sentence each."""
    experiment, scale = EXPERIMENTS[rows[0].experiment], SCALES[rows[0].scale]
    present = set(settings_of(rows))
    claims = [claim for claim in experiment.claims(scale) if {claim.better, claim.worse} <= present]
    sentences = [verdict(rows, claim) for claim in claims]
    if all("pixel_distance" in row.metrics for row in rows):
        sentences += [verdict(rows, claim, "pixel_distance") for claim in claims]
    if experiment.name == "fidelity" and len(present) == 2:
        sentences.append(side_by_side(rows))
    return sentences + (correlations(rows) if rows[0].curve else [])


def findings(rows: Sequence[RunRow]) -> list[str]:
    """What the rows say, a sentence each: `tested`, and what is no test."""
    experiment, sentences = EXPERIMENTS[rows[0].experiment], tested(rows)
    if experiment.name == "layers":
        sentences.append(trend(rows))
    if experiment.name == "averaging":
        sentences += closest(rows)
    return sentences


def conditions(rows: Sequence[RunRow | MethodRow]) -> str:
    """A part of a sentence: the machines that the rows come from, and how long training took."""
    seen = [row.environment for row in rows]
    told = {
        key: ", ".join(sorted({str(entry[key]) for entry in seen}))
        for key in ("processor", "threads", "commit", "date")
    }
    torch = ", ".join(sorted({entry["versions"]["torch"] for entry in seen}))
    own = ", ".join(sorted({str(row.training_threads or "not recorded") for row in rows}))
    return (
        f"{told['processor']}; threads of a training: {own}, of the judge: {told['threads']}; torch {torch}, commit "
        f"{told['commit']}, {told['date']}; {sum(row.seconds for row in rows) / 60:.0f} minutes of training in all."
    )


def draw(path: Path, rows: Sequence[RunRow], folders: dict[str, Path]) -> None:
    """The figure: distances of every setting over the seeds (or over training), and samples of the first seed's runs.

    `folders` has a run for every setting that is to be shown.
    """
    names = settings_of(rows)
    labels = _INCEPTION_NAMES if rows[0].is_inception else _OTHER_NAMES
    if not folders:
        raise InputError("runs", "has no run of these rows, so nothing to draw")
    height = 3.2 + 0.62 * len(folders)
    figure = Figure(figsize=(9, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=(3.2, 0.62 * len(folders)))  # type: ignore[misc]
    axes = upper.subplots(1, 2)
    if rows[0].curve:
        _draw_curves(axes, rows, labels)
    else:
        for axis, metric in zip(axes, DISTANCES):
            _draw_settings(axis, rows, names, metric)
            axis.set_title(labels[metric], fontsize=10)
    for axis, name in zip(np.atleast_1d(lower.subplots(len(folders), 1)), folders):
        picture = grid(load_run_sampler(folders[name]).draw(20, seed=0), columns=20)
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    save_figure(path, figure)


def _draw_settings(axis: Axes, rows: Sequence[RunRow], names: Sequence[str], metric: str) -> None:
    summaries = [summarise(of_setting(rows, name, metric)) for name in names]
    places = np.arange(len(names))
    axis.bar(places, [found.mean for found in summaries], color="#8fa8c8", width=0.6)
    axis.errorbar(
        places,
        [found.mean for found in summaries],
        yerr=[found.deviation for found in summaries],
        fmt="none",
        ecolor="#30343b",
        capsize=3,
    )
    for place, name in zip(places, names):
        values = of_setting(rows, name, metric)
        axis.plot([place] * len(values), values, "o", color="#30343b", markersize=3)
    axis.set_xticks(places, names, fontsize=8, rotation=20 if len(names) > 4 else 0)
    axis.set_ylim(bottom=0)


def _draw_curves(axes: Sequence[Axes], rows: Sequence[RunRow], labels: dict[str, str]) -> None:
    over_time, against = axes
    twin = over_time.twinx()
    for row in rows:
        steps = [point["step"] for point in row.curve]
        loss = [point["loss"] for point in row.curve]
        distance = [1000 * point["kernel_distance"] for point in row.curve]
        over_time.plot(steps, loss, color="#4c72b0", linewidth=1)
        twin.plot(steps, distance, color="#c44e52", linewidth=1, linestyle="--")
        against.plot(loss, distance, "o-", markersize=3, linewidth=0.6, label=f"seed {row.seed}")
    over_time.set_xlabel("step")
    over_time.set_ylabel("loss", color="#4c72b0")
    twin.set_ylabel(labels["kernel_distance"], color="#c44e52")
    against.set_xlabel("loss")
    against.set_ylabel(labels["kernel_distance"])
    against.legend(fontsize=8)


def read_rows(path: Path, *, smoke: bool = False) -> list[RunRow]:
    """The rows in a file that `--json` wrote; InputError that names the file if it is something else, or its rows come
    from a `smoke` run and should not, or the reverse."""
    try:
        rows = read_json(path, RunRow)
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{path}: does not hold rows of bench.paper ({error})") from None
    if not rows or rows[0].experiment not in EXPERIMENTS:
        raise InputError(f"{path}: does not hold rows of bench.paper")
    if smoke and not all(row.smoke for row in rows):
        raise InputError(f"{path}: has rows that are no --smoke run's; give another file")
    if not smoke and any(row.smoke for row in rows):
        raise InputError(f"{path}: comes from a --smoke run, whose numbers are not reported")
    return rows
