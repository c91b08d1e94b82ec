"""`python -m engine.report`: one self-contained HTML page about a run, to look at and to send."""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.configuration.command import Parser, arguments_as, memory_advice, output_file, run_command
from engine.configuration.config import Config
from engine.configuration.inputs import check_seed, choose_device, load_run_sampler, most_threads
from engine.configuration.train_command import train_command
from engine.reporting.real import FeatureSpace, feature_space, open_real
from engine.support.errors import InputError, require
from engine.support.files import check_output, write_atomically
from engine.training.run_folder import RunFolder

log = logging.getLogger("gfmn")

_MOST_NEIGHBOURS = 10**6
"""Their features are all in memory."""


def parser() -> Parser:
    """The flags of `python -m engine.report`."""
    parser = Parser(
        prog="python -m engine.report",
        description="Write one self-contained HTML page about a run: samples over time, losses, the nearest real "
        "images of some samples, interpolations, the configuration.",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="folder of a training run")
    add("--out", type=output_file, metavar="FILE", help="the page (default: report.html in the run's folder)")
    add("--title", metavar="TEXT", help="of the page (default: the folder's name)")
    add("--seed", type=int, default=0, metavar="N", help="of z (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the extractor")
    add(
        "--neighbours-of",
        type=int,
        default=10_000,
        metavar="N",
        help="look for the nearest among at most this many real images (default: 10000)",
    )
    add(
        "--feature-extractor",
        metavar="NAME",
        help="network whose features decide what is near, such as efficientnet-lite0 or inception (default: the "
        "extractor that the run matched, or EfficientNet-Lite0)",
    )
    add("--weights", metavar="FILE", help="of --feature-extractor (default: its own)")
    return parser


@memory_advice("a smaller --neighbours-of needs less")
def main(argv: Sequence[str] | None = None) -> None:
    """Check, open the run and its real images, render, write."""
    arguments = parser().parse_args(argv)
    _check(arguments)
    require("jinja2", "the report")
    from engine.reporting.page import render

    run, sampler = RunFolder(arguments.run), load_run_sampler(arguments.run)
    out: Path = arguments.out or run.path / "report.html"
    check_output(out, "out")
    config = Config.load(run.config)
    title = arguments.title or run.path.resolve().name
    # The run may be from a machine with more cores.
    threads = config.training.threads
    device = choose_device(arguments.device, None if threads is None else min(threads, most_threads()))
    page = render(
        title=title,
        sampler=sampler,
        config=config,
        command=train_command(config),
        run=run,
        real=open_real(run, config, device, _space(arguments, config.data.image_size, device)),
        seed=arguments.seed,
        limit=arguments.neighbours_of,
    )
    data = page.encode(errors="replace")
    write_atomically(out, data)
    log.info("%s: %s of step %d, %.1f MB", out, title, sampler.step, len(data) / 1e6)


def _check(arguments: Any) -> None:
    check_seed(arguments.seed)
    if not 2 <= arguments.neighbours_of <= _MOST_NEIGHBOURS:
        raise InputError("neighbours_of", f"must be from 2 to {_MOST_NEIGHBOURS}, got {arguments.neighbours_of}")
    if arguments.weights is not None and arguments.feature_extractor is None:
        raise InputError("weights", "are those of --feature-extractor NAME, which is not given")


def _space(arguments: Any, image_size: int, device: torch.device) -> FeatureSpace | None:
    """The features that `--feature-extractor` chooses; None for those of the run's own extractor."""
    if arguments.feature_extractor is None:
        return None
    with arguments_as(name="feature_extractor"):
        return feature_space(arguments.feature_extractor, arguments.weights, image_size, device)


if __name__ == "__main__":
    run_command(main)
