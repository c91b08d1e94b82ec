"""What others found of two methods, whether it holds in our rows, and the page that compares all methods."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.methods import MethodRow
from bench.paper.comparison import GAME, NO_GAME, SUPERVISED, group, read_rows, runs_of
from bench.paper.experiments import SCALES, SEEDS, SMALL
from bench.paper.results import WORDS, Summary, conditions, next_to, smaller, summarise
from bench.rows import table
from engine.support.errors import InputError
from engine.support.files import write_atomically

FIGURE = "comparison.png"


@dataclass(frozen=True)
class Ordering:
    """Somebody found samples of `better` closer to the real images than those of `worse`: runs of `comparison.runs`."""

    better: str
    worse: str
    source: str


FIDS = {
    "mm-gan": (9.8, 29.6, 72.7, 65.6),
    "dcgan": (6.8, 26.5, 58.5, 55.0),
    "lsgan": (7.8, 30.7, 87.1, 53.9),
    "wgan": (6.7, 21.5, 55.2, 41.3),
    "wgan-gp": (20.3, 24.5, 55.8, 30.0),
    "began": (13.1, 22.9, 71.4, 38.9),
    "vae": (23.8, 58.7, 155.7, 85.7),
    "glo": (49.6, 57.7, 65.4, 52.4),
    "glann": (8.6, 13.0, 46.5, 46.3),
}
"""Mean FIDs on MNIST, Fashion, CIFAR10 and CelebA: of GLO and GLANN by Hoshen et al. (2019), and of the others
by Lucic et al. (2018), whose numbers they repeat, WGAN-GP's apart."""
_HOSHEN = ("glo", "glann")


def _everywhere() -> tuple[Ordering, ...]:
    """Every pair in `FIDS` of which one is the smaller on all four data sets."""
    found = []
    for better, worse in itertools.permutations(FIDS, 2):
        if all(one < other for one, other in zip(FIDS[better], FIDS[worse])):
            sources = sorted(
                {"Hoshen et al. 2019" if name in _HOSHEN else "Lucic et al. 2018" for name in (better, worse)}
            )
            found.append(Ordering(better, worse, f"MNIST, Fashion, CIFAR10 and CelebA: {' and '.join(sources)}"))
    return tuple(found)


_PAPER = "CIFAR10: the paper's Table 4"
_MIMICRY = "CIFAR10, FID 16.8 against 22.3: torch-mimicry"
_LIB = "CIFAR10, FID {} against 30.1: torch-mimicry against chainer-gan-lib, so two codes"
ORDERINGS = (
    Ordering("gfmn", "sngan", _PAPER),
    Ordering("gfmn", "wgan-gp", _PAPER),
    *_everywhere(),
    Ordering("sngan", "wgan-gp", _MIMICRY),
    Ordering("sngan", "dfm", _LIB.format("16.8")),
    Ordering("wgan-gp", "dfm", _LIB.format("22.3")),
)
"""Those that this project has a source for, by FID or the Inception score, on every data set that is named."""
HOSHENS_TABLE = {
    "MM GAN": "mm-gan",
    "NS GAN": "dcgan",
    "LSGAN": "lsgan",
    "WGAN": "wgan",
    "BEGAN": "began",
    "VAE": "vae",
    "GLO": "glo",
    "GLANN": "glann",
}
"""What the table of Hoshen et al. (2019) calls them, in its order, and the runs."""


def names_of(rows: Sequence[MethodRow]) -> list[str]:
    """Methods, in the rows' order."""
    return list(dict.fromkeys(row.name for row in rows))


def summary(rows: Sequence[MethodRow], name: str, field: str, factor: float = 1.0) -> Summary | None:
    """Of a field over the seeds of a method; None if it was not measured."""
    values = [getattr(row, field) for row in rows if row.name == name]
    return None if not values or None in values else summarise([factor * value for value in values])


_COLUMNS = (
    ("read", "confident", 100.0),
    ("rarest digit", "least_share", 100.0),
    ("kernel distance · 1000", "kernel_distance", 1000.0),
    ("Fréchet distance", "frechet_distance", 1.0),
    ("precision", "precision", 1.0),
    ("recall", "recall", 1.0),
    ("Inception score", "classifier_score", 1.0),
    ("distinct neighbours", "distinct", 1.0),
    ("colour", "chroma", 1.0),
    ("edge", "edge_level", 1.0),
    ("CPU s", "cpu_seconds", 1.0),
    ("MiB", "mebibytes", 1.0),
)
"""Heading, field and factor of the table's numbers."""


def results_table(rows: Sequence[MethodRow]) -> str:
    """A line a method: mean and deviation over the seeds of everything that was measured."""
    columns = [column for column in _COLUMNS if any(getattr(row, column[1]) is not None for row in rows)]
    lines = []
    for name in names_of(rows):
        own = [row for row in rows if row.name == name]
        steps = " or ".join(f"{count:,}" for count in sorted({row.steps for row in own}))
        usual = own[0].preset_steps
        share = f"{own[0].steps / usual:.0%}" if usual else "–"
        cells = [str(summary(rows, name, field, factor) or "–") for _, field, factor in columns]
        flags = own[0].flags.partition(" --seed ")[0]
        settings = [f"`{flags}`", own[0].summary, f"{steps} × {own[0].minibatch}", share]
        lines.append([name, group(name), *settings, *cells, len(own)])
    fixed = ["method", "group", "flags", "settings", "steps × minibatch", "of the preset's steps"]
    return table([*fixed, *(heading for heading, *_ in columns), "seeds"], lines)


def hoshen_table(rows: Sequence[MethodRow]) -> str:
    """The methods of Hoshen et al. (2019), as far as there are rows of them."""
    fields = _COLUMNS[:1] + _COLUMNS[2:6]
    lines = [
        [title, name, *(str(summary(rows, name, field, factor) or "–") for _, field, factor in fields)]
        for title, name in HOSHENS_TABLE.items()
        if name in names_of(rows)
    ]
    return table(["there called", "method", *(heading for heading, *_ in fields)], lines)


def holds(rows: Sequence[MethodRow], ordering: Ordering) -> str | None:
    """A sentence: does the ordering hold in these rows, by the kernel distance? None if a method is missing."""
    better, worse = (
        summary(rows, name, "kernel_distance", 1000.0) if name in names_of(rows) else None
        for name in (ordering.better, ordering.worse)
    )
    if better is None or worse is None:
        return None
    numbers = f"{ordering.better} {better}, {ordering.worse} {worse}"
    word = WORDS[smaller(better, worse)]
    return f"{ordering.better} before {ordering.worse} ({ordering.source}): **{word}** ({numbers})"


def best_of_groups(rows: Sequence[MethodRow]) -> list[str]:
    """A sentence on the smallest mean kernel distances in each group of the paper's Table 4, and one on the groups'."""
    found, best = [], {}
    for kind in (NO_GAME, GAME, SUPERVISED):
        means = {name: summary(rows, name, "kernel_distance", 1000.0) for name in names_of(rows) if group(name) == kind}
        known = {name: entry for name, entry in means.items() if entry is not None}
        if known:
            name = min(known, key=lambda method: known[method].mean)
            best[f"{name} ({kind})"] = known[name]
            found.append(f"{kind}, {len(known)} method{'s'[: len(known) > 1]}: {next_to(known)}")
    return [*found, f"of the groups' closest, {next_to(best)}"] if len(best) > 1 else found


def findings(rows: Sequence[MethodRow]) -> list[str]:
    """What the rows say, a line of a list each."""
    sentences = [sentence for ordering in ORDERINGS if (sentence := holds(rows, ordering)) is not None]
    return [f"- {sentence}" for sentence in (*sentences, *best_of_groups(rows))]


def document(page_file: Path, files: Sequence[Path]) -> None:
    """Write the page from files of rows, one a scale; InputError if there is no picture beside it."""
    results = [read_rows(path) for path in files]
    if not (page_file.parent / FIGURE).exists():
        raise InputError("document", f"{page_file.parent / FIGURE} does not exist; draw it with --figure")
    write_atomically(page_file, page(results).encode())


def page(results: Sequence[Sequence[MethodRow]]) -> str:
    """docs/comparison.md: the methods side by side, a scale a section."""
    claims = sum(holds(rows, ordering) is not None for rows in results for ordering in ORDERINGS)
    told = f" There are {claims} orderings here, not corrected for their number." if claims else ""
    parts = [_INTRODUCTION + told]
    if not results:
        parts.append(
            _NOT_RUN.format(orderings="\n".join(f"- {o.better} before {o.worse} ({o.source})" for o in ORDERINGS))
        )
    for number, rows in enumerate(results):
        parts.append(_section(rows, figure=number == 0))
    return "\n\n".join(parts) + "\n"


def _section(rows: Sequence[MethodRow], figure: bool) -> str:
    first = rows[0]
    said = {
        "agrees": "Orderings that hold here",
        "disagrees": "Orderings that don't hold here",
        "undecided": "Orderings that these runs leave open",
    }
    parts = [f"## {first.scale}", _conditions(rows)]
    parts += [f"![Samples of every method, seed {first.seed}]({FIGURE})"] if figure else []
    parts.append(results_table(rows))
    sentences = [sentence for ordering in ORDERINGS if (sentence := holds(rows, ordering)) is not None]
    for word, heading in said.items():
        own = [f"- {sentence}" for sentence in sentences if f"**{word}**" in sentence]
        parts.append(f"### {heading}\n\n" + ("\n".join(own) or "None."))
    if set(HOSHENS_TABLE.values()) & set(names_of(rows)):
        parts.append("### The methods that Hoshen et al. (2019) compare\n\n" + hoshen_table(rows))
    parts.append("### The groups of the paper's Table 4\n\n" + "\n".join(f"- {line}" for line in best_of_groups(rows)))
    return "\n\n".join(parts)


def _conditions(rows: Sequence[MethodRow]) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in rows if row.seed is not None}))
    names, wanted = names_of(rows), runs_of(SCALES[rows[0].scale or SMALL])
    missing = f"**{len(rows)} of {SEEDS * len(wanted)} runs so far.** " if len(rows) < SEEDS * len(wanted) else ""
    if absent := [name for name in wanted if name not in names]:
        missing += f"No run of {', '.join(absent)}. "
    return (
        f"{missing}{rows[0].budget} seconds of training for each method, seeds {seeds}; distances, precision and "
        f"recall by {rows[0].judge}. {conditions(rows)}"
    )


_INTRODUCTION = """# All methods under one budget

`python -m bench.paper --experiment methods --device cpu --jobs 2 --json ROWS.json` trains every method of the engine
with three seeds and one budget, and judges their samples; `--document docs/comparison.md ROWS.json` writes this page
from the rows. No number in it is typed by hand. The budget is seconds of training, CPU seconds on a CPU: what a user
pays for a method. Steps and generated images count something else in every family, as a step may train a critic five
times, draw a pool of samples, or only reconstruct. A short run of each method says how many steps the budget buys,
rounded down to tens: a method of few steps leaves up to a fifth of the budget. On a shared machine a second buys more
steps at one hour than at another. Pretraining the matched network, and starting, are not counted. Where a run is
shorter than its preset's, averages of weights and first stages of training are shorter in proportion. All other
settings are the presets', which were found with other numbers of steps, by the two judges below and with more trials
for some methods than for others. On the digits, the network that gfmn, mmd, frechet, sinkhorn and drifting match
learned from the digits' labels, anew for each seed.

Distances, precision and recall are by the features of a network that no method was trained on. *Read* is the share of
samples, in percent, that a support vector machine fitted to real 8×8 digits reads with confidence, and *rarest digit*
the smallest share of the ten. *Distinct neighbours* counts the real images that are nearest to some sample, in pixels;
gmmn, imle, glo, glann and the autoencoders train on pixels or on pyramids of them, so this column favours them.
*Colour* and *edge* are how far the colour on ink and the level of the outermost pixels are from the real images', of
255; on the digits, gfmn and mmd match a second network, `opponent`, which was made to see colours, so *colour* favours
them. *CPU s* and *MiB* cover the whole command, its start and its files as well; a dash means not measured. An ordering
that others found "agrees" or "disagrees" if the mean kernel distances over the seeds differ by Welch's t-test at 95%;
otherwise it is "undecided". Of Lucic et al. and Hoshen et al. these are all orderings that hold in the means on all
four of their data sets. Which method is closest in a group is read off the means, without a test."""

_NOT_RUN = """## Not run yet

Nobody has run this comparison yet. These orderings will be looked at:

{orderings}"""
