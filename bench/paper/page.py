"""docs/experiments.md: what was tried, measured and found, from rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.paper.experiments import EXPERIMENTS, SCALES, SMALL
from bench.paper.results import conditions, findings, results_table, settings_of, tested
from bench.paper.runs import RunRow, chosen
from bench.paper.search import best
from bench.rows import table


def figures_of(folder: Path, rows: Sequence[RunRow]) -> list[str]:
    """Files in experiments/ beside the page, that show these rows: `figure_name`.png, or several of its parts, each
    with a minus and more behind it."""
    name, scale = figure_name(rows[0]), rows[0].scale
    found = [*folder.glob(f"experiments/{name}.png"), *folder.glob(f"experiments/{name}-*.png")]
    if scale == SMALL:
        others = tuple(f"{name}-{other}" for other in SCALES if other != SMALL)
        found = [path for path in found if not path.name.startswith(others)]
    return [f"experiments/{path.name}" for path in sorted(found, key=lambda path: (len(path.name), path.name))]


def figure_name(row: RunRow) -> str:
    """The experiment's name, and at another scale than the digits that scale's."""
    return row.experiment if row.scale == SMALL else f"{row.experiment}-{row.scale}"


def page(results: Sequence[list[RunRow]], figures: Sequence[Sequence[str]]) -> str:
    """docs/experiments.md: what was tried, measured and found, an experiment a section, with its figures."""
    agreements = [sentence for rows in results for sentence in findings(rows)]
    small = [rows[0].scale == SMALL for rows in results]
    sizes = f"{_NOT_RUN_LARGE} Everything below is" if all(small) else _SOME_SMALL
    parts = [_INTRODUCTION.format(tests=sum(len(tested(rows)) for rows in results), sizes=sizes)]
    for word, heading in (
        ("disagrees", "Where these runs disagree with the paper"),
        ("undecided", "What these runs leave open"),
    ):
        chosen = [sentence for sentence in agreements if f"**{word}**" in sentence]
        parts.append(f"## {heading}\n\n" + ("\n".join(f"- {sentence}" for sentence in chosen) or "Nothing."))
    parts += [_section(rows, files) for rows, files in zip(results, figures)]
    found = {rows[0].experiment for rows in results}
    missing = [name for name in EXPERIMENTS if name not in found]
    if missing:
        commands = (f"- {EXPERIMENTS[name].title}: `{_COMMAND.format(name)}`" for name in missing)
        parts.append("## Not run yet\n\n" + "\n".join(commands))
    return "\n\n".join(parts) + "\n"


_COMMAND = "python -m bench.paper --experiment {} --json ROWS.json"
_NOT_RUN_LARGE = "**Nobody has run that yet.**"
_SOME_SMALL = "Sections whose heading names no data set are"
_INTRODUCTION = """# The paper's experiments, at the size of a laptop

`python -m bench.paper --document docs/experiments.md ROWS.json …` writes this page from rows of results; no number in
it is typed by hand. Each experiment is one command, which stands in its section. With `--scale cifar10`, `stl10`,
`celeba64` or `fashion` the same command runs at the paper's scale on a GPU, judged by Inception (FID, KID, IS of
50,000 samples). {sizes} the small scale:
scikit-learn's 1,797 digits, and hundreds or a few thousand steps at large learning rates. So it shows how the method
behaves in a small training, and no more. (Where the rates are `--lr 1e-3 --ama-lr 1e-2`, they were chosen after one
look at AMA with its first seed.)

A network that no run was trained on judges the samples. Where it is not Inception, the distances are not FID and KID,
and only comparable with each other. Smaller is better for distances, larger for precision and recall. A claim "agrees"
or "disagrees" if the mean kernel distances over the seeds, or the means of what else it names, differ by Welch's t-test
at 95%, or if the mean rank correlation differs from 0 by Student's; otherwise it is "undecided". There are {tests} such
tests below, not corrected for their number: about one in twenty would decide by chance. Which setting is closest, and
the rank correlation with the number of layers, are read off the means, without a test. The matched networks
are trained on the digits once on each machine, and are the same for all seeds. Where rates were searched, the search
ran once."""


def _section(rows: Sequence[RunRow], figures: Sequence[str]) -> str:
    experiment = EXPERIMENTS[rows[0].experiment]
    command = f"```\n{_COMMAND.format(experiment.name + _scale_flag(rows[0]) + _only_flag(rows))}\n```"
    sentences = "\n".join(f"- {sentence}" for sentence in findings(rows))
    return "\n\n".join(
        (
            f"## {experiment.title} ({experiment.source})" + ("" if rows[0].scale == SMALL else f", {rows[0].scale}"),
            command,
            _conditions(rows),
            *(f"![{experiment.title}]({figure})" for figure in figures),
            results_table(rows),
            *_not_run(rows),
            sentences,
            *_search_told(rows),
            *([experiment.remark] if experiment.remark and rows[0].scale == SMALL else []),
        )
    )


def _not_run(rows: Sequence[RunRow]) -> list[str]:
    present = settings_of(rows)
    missing = [setting.name for setting in EXPERIMENTS[rows[0].experiment].settings(SCALES[rows[0].scale])]
    missing = [name for name in missing if name not in present]
    return [f"Not run yet: {'; '.join(missing)}."] if missing else []


def searched_table(rows: Sequence[RunRow]) -> str:
    """A line a setting that was searched: every candidate with its score, and the one that was taken."""
    trials = {row.setting: row.searched for row in rows if row.searched}
    lines = []
    for name, entries in trials.items():
        taken = " ".join(best(entries))
        lines.append([name, f"`{taken}`", "; ".join(map(_trial, entries))])
    return table(["setting", "taken", "trials and their scores"], lines)


def _trial(entry: Mapping[str, Any]) -> str:
    score = entry["score"]
    return f"`{entry['flags']}` " + ("failed" if score is None else f"{score:.3f}")


def _search_told(rows: Sequence[RunRow]) -> list[str]:
    searched = [row for row in rows if row.searched]
    if not searched:
        return []
    steps = sorted({row.trial_steps for row in searched if row.trial_steps})
    line = f"Rates were searched in trials of {' and '.join(f'{count:,}' for count in steps)} steps, judged by "
    edges = at_the_edge(searched)
    told = f"The best rate was the smallest or the largest that was tried, so that others may be better: {edges}."
    return [line + f"{searched[0].searched_by}:", searched_table(searched), *([told] if edges else [])]


def at_the_edge(rows: Sequence[RunRow]) -> str:
    """Settings whose search took the smallest or the largest of three or more values of a flag, with that value."""
    found = []
    for name, entries in {row.setting: row.searched for row in rows if row.searched}.items():
        tried: dict[str, set[float]] = {}
        for entry in entries:
            for flag, value in _pairs(entry["flags"].split()):
                tried.setdefault(flag, set()).add(float(value))
        for flag, value in _pairs(best(entries)):
            if len(tried[flag]) > 2 and float(value) in (min(tried[flag]), max(tried[flag])):
                found.append(f"{name} (`{flag} {value}`)")
    return "; ".join(found)


def _pairs(words: Sequence[str]) -> zip[tuple[str, str]]:
    return zip(words[::2], words[1::2], strict=True)


def _scale_flag(row: RunRow) -> str:
    return "" if row.scale == SMALL else f" --scale {row.scale}"


def _only_flag(rows: Sequence[RunRow]) -> str:
    """The flag that chooses the settings of these rows: by a part of their names if that says as much."""
    settings, present = EXPERIMENTS[rows[0].experiment].settings(SCALES[rows[0].scale]), settings_of(rows)
    if len(present) == len(settings):
        return ""
    parts = present[0].split(", ")
    of_parts = {part: [setting.name for setting in chosen(settings, [part])] for part in parts}
    names = next(([part] for part, own in of_parts.items() if sorted(own) == sorted(present)), present)
    return f" --only {shlex.join(names)}"


def _conditions(rows: Sequence[RunRow]) -> str:
    row = rows[0]
    seeds = sorted({entry.seed for entry in rows})
    judge = row.network if row.is_inception else f"features of {row.network} (not FID and KID)"
    minibatches = sorted({entry.minibatch for entry in rows})
    changed = " ".join(EXPERIMENTS[rows[0].experiment].small_flags) if row.scale == SMALL else ""
    rates = f" with `{changed}`" if changed else ""
    dtypes = " and ".join(sorted({"bf16" if "--amp" in entry.flags else "float32" for entry in rows}))
    return (
        f"{row.steps:,} steps{rates} in {dtypes}, minibatch {' and '.join(map(str, minibatches))}, "
        f"seeds {', '.join(map(str, seeds))}; "
        f"{row.samples:,} samples against {row.real:,} real images by {judge}. "
        f"{conditions(rows)}{' The trials of the search are not counted.' if row.searched else ''}"
    )
