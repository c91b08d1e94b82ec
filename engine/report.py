"""`python -m engine.report`: one self-contained HTML page about a run, to look at and to send."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from engine.configuration.command import Parser, run_command
from engine.configuration.config import Config
from engine.configuration.devices import choose_device
from engine.generation.sampling import RunSampler
from engine.reporting.real import chosen_space, open_real
from engine.support.errors import InputError, require
from engine.support.files import write_atomically
from engine.training.run_folder import RunFolder

log = logging.getLogger("gfmn")


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
    require("jinja2", "the report")
    from engine.reporting.page import render

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


if __name__ == "__main__":
    run_command(main)
