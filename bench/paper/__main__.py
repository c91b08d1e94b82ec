"""`python -m bench.paper`: the paper's experiments, each one command that writes rows, a table and a figure.

`--experiment layers|extractors|averaging|loss-vs-quality|fidelity` runs on the digits in minutes; `--scale cifar10` (or
another preset) at the paper's scale. Finished runs in `--runs` are not run again, and an interrupted one is resumed.
`--document PAGE ROWS…` writes the page with all results.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.paper.experiments import EXPERIMENTS, SCALES, SMALL
from bench.paper.results import draw, findings, page, read_rows, results_table
from bench.paper.runs import ExperimentPlan, RunRow, run_experiment, run_folder
from bench.rows import write_json
from engine.configuration.command import Parser, output_file, run_command
from engine.support.files import write_atomically


def parser() -> Parser:
    """The flags of `python -m bench.paper`."""
    arguments = Parser(
        prog="python -m bench.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = arguments.add_argument
    what = arguments.add_mutually_exclusive_group(required=True)
    what.add_argument("--experiment", choices=tuple(EXPERIMENTS))
    what.add_argument("--document", type=Path, metavar="PAGE", help="write this Markdown page from files of rows")
    add("rows", nargs="*", type=Path, metavar="ROWS", help="with --document: files that --json wrote")
    add("--scale", choices=tuple(SCALES), default=SMALL, help="data set (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="runs of every setting (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="training steps, in place of the scale's")
    add("--data", metavar="PATH", help="the data set's folder, where it needs one")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--runs", type=Path, default=Path("runs/paper"), metavar="DIR", help="for the runs (default: %(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write the rows there")
    add("--figure", type=output_file, metavar="FILE", help="draw them there (PNG; default: in --runs)")
    add("--smoke", action="store_true", help="three steps of everything, to see that it runs; numbers mean nothing")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run an experiment, or with --document write the page."""
    arguments = parser().parse_args(argv)
    if arguments.document is not None:
        _document(arguments)
        return
    if arguments.rows:
        parser().error("ROWS: only --document takes files of rows")
    if arguments.seeds < 1:
        parser().error(f"--seeds: must be at least 1, got {arguments.seeds}")
    if arguments.steps is not None and arguments.steps < 1:
        parser().error(f"--steps: must be at least 1, got {arguments.steps}")
    experiment = EXPERIMENTS[arguments.experiment]
    plan = ExperimentPlan(
        scale=SCALES[arguments.scale],
        folder=arguments.runs,
        seeds=range(arguments.seeds),
        steps=arguments.steps,
        smoke=arguments.smoke,
        data=arguments.data,
        device=arguments.device,
    )
    rows: list[RunRow] = []
    for row in run_experiment(experiment, plan):
        rows.append(row)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in row.metrics.items())
        print(f"{row.setting}, seed {row.seed}: {numbers}  ({row.seconds:.0f} s)", flush=True)
        if arguments.json is not None:
            write_json(arguments.json, rows)
    print(f"\n{results_table(rows)}\n")
    if plan.smoke:
        print("--smoke: these numbers mean nothing")
    else:
        print("\n".join(f"- {sentence}" for sentence in findings(rows)))
    figure = arguments.figure or plan.folder / f"{experiment.name}-{plan.scale.name}.png"
    shown = {setting.name: run_folder(experiment, setting, plan, 0) for setting in experiment.settings(plan.scale)}
    draw(figure, rows, shown)
    print(f"\nfigure: {figure}")


def _document(arguments: argparse.Namespace) -> None:
    if not arguments.rows:
        parser().error("--document: needs files of rows, as --json writes them")
    results = [read_rows(path) for path in arguments.rows]
    folder = arguments.document.parent
    figures = [f"experiments/{rows[0].experiment}.png" for rows in results]
    for figure in figures:
        if not (folder / figure).exists():
            parser().error(f"--document: {folder / figure} does not exist; draw it with --figure")
    order = list(EXPERIMENTS)
    pairs = sorted(zip(results, figures), key=lambda pair: order.index(pair[0][0].experiment))
    write_atomically(arguments.document, page([rows for rows, _ in pairs], [name for _, name in pairs]).encode())
    print(os.fspath(arguments.document))


if __name__ == "__main__":
    run_command(main)
