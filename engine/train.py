"""`python -m engine.train`: train a generator by comparing features."""

from __future__ import annotations

import argparse
import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.comparison.reference.cache import write_bad_images
from engine.configuration.build import (
    make_extractor,
    make_generator,
    make_method,
    make_reference,
    make_schedule,
    make_validation,
)
from engine.configuration.command import Parser, arguments_as, run_command
from engine.configuration.config import Config
from engine.configuration.flags import add_flags, given_flags
from engine.configuration.inputs import amp_dtype, choose_device, open_data
from engine.configuration.planning import choose_chunk, print_plans
from engine.configuration.presets import PRESETS, usual_steps
from engine.support.errors import InputError, Interrupted, require
from engine.support.pixels import save_png
from engine.training.logbook import plot_metrics
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer

log = logging.getLogger("gfmn")


def parser() -> Parser:
    """A flag for every setting, and where and how to run."""
    digits = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in PRESETS["digits"].items())
    parser = Parser(
        prog="python -m engine.train",
        description="Train a generator by comparing features of generated and real images: by default the mean and "
        "variance of perceptual features (GFMN). With no arguments: real handwritten digits, minutes on a laptop. "
        f"A preset takes the place of the defaults below; digits sets {digits}.",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="settings to start from (default: digits)")
    parser.add_argument("--config", metavar="FILE", help="a run's config.json, to do the same again")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: a new one in runs/)")
    parser.add_argument("--resume", action="store_true", help="resume the run in --out")
    parser.add_argument(
        "--plan", action="store_true", help="print what memory the ways to train this would need, and stop; no training"
    )
    add_flags(parser)
    return parser


def configure(arguments: argparse.Namespace) -> tuple[Config, RunFolder, bool]:
    """The configuration, the run's folder, and whether it is resumed."""
    given = given_flags(arguments)
    if arguments.resume:
        if arguments.out is None:
            raise InputError("resume", "needs --out DIR, the run to resume")
        run = RunFolder(arguments.out)
        if arguments.preset is not None or arguments.config is not None:
            raise InputError("resume", "the run has its own configuration; leave out --preset and --config")
        return Config.load(run.config).resumed_with(given), run, True
    if arguments.config is not None:
        if arguments.preset is not None:
            raise InputError("config", "already names a preset; leave out --preset")
        config = Config.load(arguments.config).replaced(given)
    else:
        config = Config.build(arguments.preset or "digits", given)
    return config, RunFolder(arguments.out or _new_folder(config.preset)), False


def _new_folder(preset: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = (Path("runs") / (f"{preset}-{stamp}" + (f"-{n}" if n else "")) for n in range(1000))
    return next(path for path in candidates if not path.exists())


def build(config: Config, asked: Config, run: RunFolder, device: torch.device, *, resume: bool) -> Trainer:
    """Make everything that a run needs, and start its folder or restore it; `asked` is the configuration to keep."""
    dataset = open_data(config)
    # Before the networks that draw their weights: a run's seed decides them.
    torch.manual_seed(config.training.seed)
    generator = make_generator(config).to(device)
    checkpoint = None
    if resume:
        run.remove_leftovers()
        checkpoint = run.newest_checkpoint()
    else:
        _check_new(run)
    extractor = make_extractor(config, dataset, device)
    reference = make_reference(config, extractor, dataset, amp_dtype(config))
    method = make_method(config, generator, extractor, reference)
    trainer = Trainer(method, make_schedule(config), run, reference.fingerprint or {}, make_validation(config, device))
    if checkpoint is not None:
        with arguments_as(checkpoint="resume"):
            trainer.restore(checkpoint)
    run.write_config(asked.to_json())
    write_bad_images(run.path / "bad_images.txt", reference)
    run.truncate_metrics(trainer.step)
    log.info("run folder: %s", run.path)
    log.info(
        "%s, %s on %s, %s: %d features of %d images, minibatch %d",
        config.method.method,
        config.networks.extractor,
        dataset.name,
        _device_name(device),
        extractor.num_features,
        reference.count,
        config.training.batch_size,
    )
    log.info("%d steps; %s", config.training.steps, usual_steps(config.data.image_size))
    return trainer


def _check_new(run: RunFolder) -> None:
    try:
        run.check_new()
    except InputError as error:
        hint = "; --resume resumes it" if run.config.exists() else ""
        raise InputError("out", f"{run.path} {error.message}{hint}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, train, close."""
    arguments = parser().parse_args(argv)
    asked, run, resume = configure(arguments)
    begun = time.perf_counter()
    device = choose_device(asked.training.device, asked.training.threads)
    if arguments.plan:
        print_plans(asked, device)
        return
    if asked.validation.evaluate_every is not None:
        require("torch_fidelity", "evaluation")  # rather missing now than after the extractor has been trained
    trainer = build(choose_chunk(asked, device), asked, run, device, resume=resume)
    try:
        trainer.fit()
    except Interrupted as interruption:
        command = f"python -m engine.train --resume --out {run.path}"
        raise Interrupted(f"{interruption}; resume with: {command}") from None
    save_png(run.final_samples, trainer.picture())
    plotted = plot_metrics(run.loss_plot, list(run.read_metrics()))
    log.info(
        "done in %.0f s\nsamples: %s\n%smore:    python -m engine.sample --run %s --count 1000 --out samples.npy",
        time.perf_counter() - begun,
        run.final_samples,
        f"loss:    {run.loss_plot}\n" if plotted else "",
        run.path,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


if __name__ == "__main__":
    run_command(main)
