"""`python -m bench.paper`: the paper's experiments, each one command that writes rows, a table and a figure.

`--experiment layers|extractors|averaging|loss-vs-quality|fidelity` runs on the digits in minutes (`averaging` in
hours), and `--experiment methods` compares all methods with one another; `--scale cifar10` (or another data set) at
the paper's scale. Finished runs in `--runs` are not run again, and an interrupted one is resumed; nor is a run again
that has a row in the file of `--json`, so that several commands, also on several machines, may share it. `--only` runs
a part. `--jobs 2` trains two at a time on a CPU, with one thread each. What fails is named at the end, with exit code
2, and the others go on.
`--document PAGE ROWS…` writes the page with all results; the rows of `methods` have a page of their own.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.commands import interruptible
from bench.methods import MethodRow
from bench.paper import comparison, orderings
from bench.paper.experiments import EXPERIMENTS, SCALES, SEEDS, SMALL, Experiment
from bench.paper.page import figure_name, figures_of, page
from bench.paper.results import draw, findings, read_rows, results_table, settings_of
from bench.paper.runs import ExperimentPlan, Rows, RunRow, check_device, chosen, run_experiment, run_folder, steps_of
from bench.rows import Row, write_json
from engine.configuration.command import Parser, check_two_files, output_file, run_command
from engine.support.errors import InputError
from engine.support.files import locked, write_atomically

_NOTHING_TO_DRAW = "--figure: --runs has no run of these rows, so nothing to draw"


def parser() -> Parser:
    """The flags of `python -m bench.paper`."""
    arguments = Parser(
        prog="python -m bench.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = arguments.add_argument
    what = arguments.add_mutually_exclusive_group(required=True)
    what.add_argument("--experiment", choices=(*EXPERIMENTS, comparison.NAME))
    what.add_argument("--document", type=Path, metavar="PAGE", help="write this Markdown page from files of rows")
    add("rows", nargs="*", type=Path, metavar="ROWS", help="with --document: files that --json wrote")
    add("--scale", choices=tuple(SCALES), default=SMALL, help="data set (default: %(default)s)")
    add("--seeds", type=int, default=SEEDS, metavar="N", help="runs of every setting (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="training steps, in place of the scale's")
    add("--only", nargs="+", default=(), metavar="NAME", help="some of the methods, or of the experiment's settings, "
        "also by a part of their names, such as a minibatch's number")  # fmt: skip
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    add("--budget", type=int, metavar="SECONDS", help="of training for each method (CPU seconds; on a GPU, seconds by "
        "the clock), in place of the scale's")  # fmt: skip
    add("--data", metavar="PATH", help="the data set's folder, where it needs one")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--runs", type=Path, default=Path("runs/paper"), metavar="DIR", help="for the runs (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="the rows; those that it has are kept, and not run again")
    add("--figure", type=output_file, metavar="FILE", help="draw them there (PNG; default: in --runs)")
    add("--smoke", action="store_true", help="three steps of everything, to see that it runs; numbers mean nothing")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run an experiment, or with --document write the page."""
    arguments = parser().parse_args(argv)
    if arguments.document is not None:
        _document(arguments)
        return
    check_two_files(arguments, "json", "figure")
    if arguments.rows:
        parser().error("ROWS: only --document takes files of rows")
    if arguments.seeds < 1:
        parser().error(f"--seeds: must be at least 1, got {arguments.seeds}")
    for flag in ("steps", "jobs", "budget"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            parser().error(f"--{flag}: must be at least 1, got {value}")
    of_methods = arguments.experiment == comparison.NAME
    if arguments.budget is not None and not of_methods:
        parser().error(f"--budget: only --experiment {comparison.NAME} has one")
    if arguments.steps is not None and of_methods:
        parser().error("--steps: the --budget says how many steps each method takes")
    if arguments.jobs > 1 and arguments.device == "cuda":
        parser().error("--jobs: runs that share a GPU wait for each other, so times mean nothing; leave it at 1")
    plan = ExperimentPlan(
        scale=SCALES[arguments.scale],
        folder=arguments.runs,
        seeds=range(arguments.seeds),
        steps=arguments.steps,
        smoke=arguments.smoke,
        data=arguments.data,
        device=arguments.device,
        only=arguments.only,
        jobs=arguments.jobs,
    )
    with interruptible():
        if of_methods:
            _methods(arguments, plan)
        else:
            _experiment(EXPERIMENTS[arguments.experiment], arguments, plan)


def _methods(arguments: argparse.Namespace, plan: ExperimentPlan) -> None:
    budget = arguments.budget or comparison.budget(plan)
    own: comparison.Rows = {}
    failures: list[str] = []

    def found() -> list[MethodRow]:
        return comparison.ordered({**comparison.kept_rows(arguments.json, plan, budget), **own}, plan)

    kept = comparison.kept_rows(arguments.json, plan, budget)
    with contextlib.closing(comparison.compare(plan, budget, failures, kept)) as rows:
        for row in rows:
            own[row.name, row.seed] = row
            told = f"kernel distance {row.kernel_distance:.4g}  ({row.seconds:.0f} s)"
            print(f"{row.name}, seed {row.seed}: {told}", flush=True)
            _write(arguments.json, found)
    if all_rows := found():
        print(f"\n{orderings.results_table(all_rows)}\n")
        print("--smoke: these numbers mean nothing" if plan.smoke else "\n".join(orderings.findings(all_rows)))
        figure = arguments.figure or plan.folder / f"{comparison.NAME}-{plan.scale.name}.png"
        if comparison.draw(figure, plan):
            print(f"\nfigure: {figure}")
        elif arguments.figure is not None:
            failures.append(_NOTHING_TO_DRAW)
    _check(failures)


def _write(file: Path | None, rows: Callable[[], Sequence[Row]]) -> None:
    """`rows`, which reads what `file` has now: another command may have written there since."""
    if file is not None:
        with locked(file.with_name(file.name + ".lock"), busy=lambda: None):
            write_json(file, rows())


def _check(failures: Sequence[str]) -> None:
    if failures:
        raise InputError(f"{len(failures)} failed, the others are done: {'; '.join(failures)}")


def _experiment(experiment: Experiment, arguments: argparse.Namespace, plan: ExperimentPlan) -> None:
    own: Rows = {}
    failures: list[str] = []

    def found() -> list[RunRow]:
        return _ordered({**_kept_rows(arguments.json, experiment, plan), **own}, experiment, plan)

    kept = _kept_rows(arguments.json, experiment, plan)
    with contextlib.closing(run_experiment(experiment, plan, failures, kept)) as rows:
        for row in rows:
            own[row.setting, row.seed] = row
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in row.metrics.items())
            print(f"{row.setting}, seed {row.seed}: {numbers}  ({row.seconds:.0f} s)", flush=True)
            _write(arguments.json, found)
    if all_rows := found():
        failures += _tell(experiment, plan, all_rows, arguments.figure)
    _check(failures)


def _tell(experiment: Experiment, plan: ExperimentPlan, rows: Sequence[RunRow], figure: Path | None) -> list[str]:
    """Print the table and the findings, and draw the figure; what could not be done."""
    print(f"\n{results_table(rows)}\n")
    if plan.smoke:
        print("--smoke: these numbers mean nothing")
    else:
        print("\n".join(f"- {sentence}" for sentence in findings(rows)))
    asked, figure = figure is not None, figure or plan.folder / f"{experiment.name}-{plan.scale.name}.png"
    settings = {setting.name: setting for setting in chosen(experiment.settings(plan.scale), plan.only)}
    rows = [row for row in rows if row.setting in settings]  # a figure for each part of the experiment that is run
    folders = {name: run_folder(experiment, settings[name], plan, plan.seeds[0]) for name in settings_of(rows)}
    shown = {name: folder for name, folder in folders.items() if (folder / "row.json").exists()}
    if shown:
        draw(figure, rows, shown)
        print(f"\nfigure: {figure}")
    return [_NOTHING_TO_DRAW] if asked and not shown else []


def _kept_rows(file: Path | None, experiment: Experiment, plan: ExperimentPlan) -> Rows:
    """Those in `file`, by setting and seed; InputError if they are of another experiment."""
    if file is None or not file.is_file() or not file.stat().st_size:
        return {}
    rows = read_rows(file, smoke=plan.smoke)
    here = (experiment.name, plan.scale.name, steps_of(experiment, plan))
    found = {(row.experiment, row.scale, row.steps) for row in rows}
    if found != {here}:
        other = next(iter(found - {here}))
        raise InputError("json", f"{file} has rows of {other[0]}, {other[1]}, {other[2]} steps; give another file")
    for row in rows:
        check_device(file, row.device, plan)
    return {(row.setting, row.seed): row for row in rows}


def _ordered(rows: Rows, experiment: Experiment, plan: ExperimentPlan) -> list[RunRow]:
    """Seed by seed, in the order of the experiment."""
    names = [setting.name for setting in experiment.settings(plan.scale)]
    return sorted(
        (row for row in rows.values() if row.setting in names), key=lambda row: (row.seed, names.index(row.setting))
    )


def _document(arguments: argparse.Namespace) -> None:
    if not arguments.rows:
        parser().error("--document: needs files of rows, as --json writes them")
    for name, value in vars(arguments).items():
        if name not in ("document", "rows", "verbose") and value != parser().get_default(name):
            parser().error(f"--{name}: is of --experiment, and --document takes all from its files; leave it out")
    if arguments.document.suffix != ".md":
        parser().error(f"--document: {arguments.document} must end in .md; the files of rows come after it")
    if all(comparison.are_rows(path) for path in arguments.rows):
        orderings.document(arguments.document, arguments.rows)
        print(os.fspath(arguments.document))
        return
    results = [read_rows(path) for path in arguments.rows]
    folder = arguments.document.parent
    results.sort(key=lambda rows: list(EXPERIMENTS).index(rows[0].experiment))
    figures = [figures_of(folder, rows) for rows in results]
    for rows, files in zip(results, figures):
        if not files:
            missing = folder / f"experiments/{figure_name(rows[0])}.png"
            parser().error(f"--document: {missing} does not exist; draw it with --figure")
    write_atomically(arguments.document, page(results, figures).encode())
    print(os.fspath(arguments.document))


if __name__ == "__main__":
    run_command(main)
