"""`python -m engine.train`: train a generator by matching perceptual features."""

from __future__ import annotations

import argparse
import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.comparison.reference.statistics_pass import write_bad_images
from engine.configuration.build import make_extractor, make_objective, make_target, open_data
from engine.configuration.command import Parser, run_command
from engine.configuration.config import PRESETS, Config, add_flags, given_flags
from engine.configuration.devices import choose_device
from engine.generation.networks import build_generator
from engine.support.errors import InputError, require
from engine.support.pixels import grid, save_png
from engine.training.logbook import plot_metrics
from engine.training.planner import choose_chunk, print_plans
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer, amp_dtype

log = logging.getLogger("gfmn")


def parser() -> Parser:
    """The command line: a flag for every field of the configuration, and where and how to run."""
    arguments = Parser(
        prog="python -m engine.train",
        description="Train a generator by matching the mean and variance of perceptual features (GFMN). With no "
        "arguments: real handwritten digits, a few minutes on a laptop.",
    )
    arguments.add_argument("--preset", choices=tuple(PRESETS), help="settings to start from (default: digits)")
    arguments.add_argument("--config", metavar="FILE", help="a run's config.json, to do the same again")
    arguments.add_argument("--out", metavar="DIR", help="the run's folder (default: a new one in runs/)")
    arguments.add_argument("--resume", action="store_true", help="go on with the run in --out")
    arguments.add_argument(
        "--plan", action="store_true", help="print what memory the ways to train this would need, and stop; no training"
    )
    add_flags(arguments)
    return arguments


def configure(arguments: argparse.Namespace) -> tuple[Config, RunFolder, bool]:
    """The configuration, the run's folder, and whether it is resumed."""
    given = given_flags(arguments)
    if arguments.resume:
        if arguments.out is None:
            raise InputError("--resume: needs --out DIR, the run to go on with")
        run = RunFolder(arguments.out)
        if arguments.preset is not None or arguments.config is not None:
            raise InputError("--resume: the run has its own configuration; leave out --preset and --config")
        return Config.load(run.config).with_flags(given), run, True
    if arguments.config is not None:
        if arguments.preset is not None:
            raise InputError("--config: already names a preset; leave out --preset")
        config = Config.load(arguments.config).replaced(given)
    else:
        config = Config.build(arguments.preset or "digits", given)
    return config, RunFolder(arguments.out or _new_folder(config.preset)), False


def _new_folder(preset: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = (Path("runs") / (f"{preset}-{stamp}" + (f"-{n}" if n else "")) for n in range(1000))
    return next(path for path in candidates if not path.exists())


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
        require("torch_fidelity", "evaluation")  # rather now than after the extractor has been trained
    config = choose_chunk(asked, device)
    dataset = open_data(config)
    torch.manual_seed(config.training.seed)
    generator = build_generator(config.networks.generator, image_size=config.data.image_size, nz=config.networks.nz).to(
        memory_format=torch.channels_last
    )
    generator.to(device)
    checkpoint = None
    if resume:
        run.remove_leftovers()
        checkpoint = run.newest_checkpoint()
    else:
        run.check_new()
    extractor = make_extractor(config, dataset, device)
    dtype = amp_dtype(config)
    target = make_target(config, extractor, dataset, dtype)
    objective = make_objective(config, extractor, target, dtype)
    validation = None
    if config.validation.evaluate_every is not None:
        from engine.training.validation import make_validation  # torch-fidelity takes a second to import

        validation = make_validation(config, device)
    trainer = Trainer(generator, objective, config, run, target.fingerprint or {}, validation)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    run.write_config(asked)
    write_bad_images(run.path / "bad_images.txt", target)
    run.truncate_metrics(checkpoint.step if checkpoint else 0)
    log.info("run folder: %s", run.path)
    log.info(
        "%s on %s, %s: %d features of %d images, %s, minibatch %d",
        config.networks.extractor,
        dataset.name,
        _device_name(device),
        extractor.num_features,
        target.count,
        objective.kernels.__name__,
        config.training.batch_size,
    )
    trainer.fit()
    save_png(run.final_samples, grid(trainer.sample(trainer.fixed_z), columns=8))
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
