"""`python -m engine.train`: train a generator by comparing features."""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import contextlib
import logging
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine.comparison.reference.cache import write_bad_images
from engine.comparison.reference.protocols import Reference
from engine.configuration.autoencoders import perceptual_fingerprint
from engine.configuration.build import (
    Networks,
    make_extractor,
    make_generator,
    make_method,
    make_networks,
    make_reference,
    of_images,
    pretrained_files,
)
from engine.configuration.command import Parser, arguments_as, memory_advice, run_command
from engine.configuration.config import Config
from engine.configuration.flags import add_flags, given_flags
from engine.configuration.inputs import (
    amp_dtype,
    check_graph,
    check_precision,
    check_ranks,
    check_same_step,
    choose_device,
    open_data,
)
from engine.configuration.objectives import check_features
from engine.configuration.planning import choose_chunk, planned_device, print_plans
from engine.configuration.presets import PRESETS, preset_values, usual_steps
from engine.configuration.risks import risks
from engine.configuration.running import check_images, make_delivery, make_machinery, make_schedule, make_validation
from engine.configuration.train_command import resume_command
from engine.generation.networks import Generator
from engine.representation.extractor import Extractor
from engine.support.errors import InputError, Interrupted, WriteError, require
from engine.support.files import check_file
from engine.support.pixels import save_png
from engine.training.checkpoint import Checkpoint
from engine.training.job import job
from engine.training.logbook import plot_metrics
from engine.training.planner import release_memory
from engine.training.ranks import ALONE, Ranks
from engine.training.run_folder import RunFolder, saved_step
from engine.training.trainer import Trainer
from pipelines import ImageDataset

log = logging.getLogger("gfmn")

KEPT_BYTES = 2**30
"""A run keeps a target of up to this many bytes."""


def parser() -> Parser:
    """A flag for every setting, and where and how to run."""
    values = preset_values("digits", "gfmn", on_digits=True)
    digits = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
    parser = Parser(
        prog="python -m engine.train",
        description="Train a generator by comparing features of generated and real images: by default the mean and "
        "variance of perceptual features (GFMN). With no arguments: real handwritten digits, minutes on a laptop. "
        "With --data PATH: your own pictures. "
        f"A preset takes the place of the defaults below; digits sets {digits}.",
    )
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), help="settings to start from (default: photos with --data, else digits)")
    parser.add_argument("--config", metavar="FILE", help="a run's config.json, to do the same again")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: a new one in runs/)")
    parser.add_argument("--resume", action="store_true", help="resume the run in --out")
    parser.add_argument(
        "--plan", action="store_true", help="print what memory the ways to train this would need, and stop; no training"
    )
    add_flags(parser)
    return parser


def configure(arguments: argparse.Namespace) -> Config:
    """The configuration that the flags ask for."""
    given = given_flags(arguments)
    if arguments.resume:
        if arguments.out is None:
            raise InputError("resume", "needs --out DIR, the run to resume")
        if arguments.preset is not None or arguments.config is not None:
            raise InputError("resume", "the run has its own configuration; leave out --preset and --config")
        return Config.load(RunFolder(arguments.out).config).resumed_with(given)
    if arguments.config is not None:
        if arguments.preset is not None:
            raise InputError("config", "already names a preset; leave out --preset")
        return Config.load(arguments.config).replaced(given)
    return Config.build(arguments.preset, given)


@contextlib.contextmanager
def own_folder(out: str | None, preset: str) -> Iterator[RunFolder]:
    """The run's folder, `out` or a new one in runs/, which is this process's alone while inside."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run = RunFolder(out) if out is not None else RunFolder.make("runs", f"{preset}-{stamp}")
    with run.owned(made=out is None):
        yield run


@contextlib.contextmanager
def shared_folder(out: str | None, preset: str, ranks: Ranks) -> Iterator[RunFolder]:
    """The run's folder: rank 0 owns it, the others, on any machine, read there what they are told to."""
    if ranks.rank > 0:
        (path, mark), *_ = ranks.meet("folder", None)
        run = RunFolder(path)
        run.check_shared(mark, ranks.check)
        ranks.meet("folder found", None)
        yield run
        return
    with own_folder(out, preset) as run:
        ranks.meet("folder", [str(run.path.absolute()), run.mark() if ranks.size > 1 else ""])
        ranks.meet("folder found", None)
        yield run


def build(
    config: Config, run: RunFolder, device: torch.device, checkpoint: Checkpoint | None, ranks: Ranks = ALONE
) -> Trainer:
    """Make everything that a run of `config` needs, and start its folder or restore it from `checkpoint`.

    All ranks share the passes over the data set. Only rank 0 writes to the folder.
    """
    target = config.matching.target if config.needs.features else None
    if target is not None and not run.target.exists():  # rather missing now than after the extractor has been trained
        check_file(target, "no such target file; make one with engine.precompute")
    # Rank 0 first: it downloads and pretrains, and the others find the results.
    dataset, generator, networks, extractor, pretrained = ranks.first(
        "prepared", lambda: _networks(config, run, device, ranks, started=checkpoint is not None)
    )
    was = None if checkpoint is None else checkpoint.fingerprint
    reference: Reference | None = None
    if extractor is not None:
        reference = make_reference(config, extractor, dataset, amp_dtype(config), run.target, was, ranks)
        entries = reference.fingerprint or {}
    else:
        entries = check_images(config, dataset, device, was, run.path, ranks, perceptual_fingerprint(networks))
    known = of_images(config, dataset, ranks, device=device, started=checkpoint is not None)
    method = make_method(config, generator, extractor, reference, ranks, networks=networks, **known)
    # A checkpoint knows its settings: somebody may have changed config.json.
    fingerprint = {**entries, **config.fixed()}
    validation = make_validation(config, device, ranks, started=checkpoint is not None)
    machinery = make_machinery(config, device)
    if method.reads == "images":
        captured = machinery["graphs"] is not None and method.capturable
        machinery["images"] = make_delivery(config, dataset, device, ranks, slots=captured)
    trainer = Trainer(method, make_schedule(config), run, fingerprint, validation, ranks=ranks, **machinery)
    if checkpoint is not None:
        with arguments_as(checkpoint="resume"):
            trainer.restore(checkpoint)
    release_memory(device)
    if ranks.rank > 0:
        return trainer
    if run.config.exists():
        run.rewind(trainer.step)
    for risk in risks(config, len(dataset)):
        log.warning("warning: %s", risk)
    run.write_config(config.to_json())
    run.keep_extractors(pretrained)
    if reference is not None:
        if reference.nbytes <= KEPT_BYTES:
            reference.save(run.target)
        write_bad_images(run.bad_images, reference)
    log.info("run folder: %s", run.path)
    log.info(
        "%s%s on %s, %s: %s%d images, minibatch %d",
        config.method.method,
        "" if extractor is None else f", {config.networks.extractor}",
        dataset.name,
        _device_name(device),
        "" if extractor is None else f"{extractor.num_features} features of ",
        len(dataset) if reference is None else reference.count,
        config.training.batch_size,
    )
    hint = f"; {usual_steps(config.data.image_size, config.method.method)}" if config.needs.features else ""
    log.info("%d steps%s", config.training.steps, hint)
    return trainer


def _networks(
    config: Config, run: RunFolder, device: torch.device, ranks: Ranks, *, started: bool
) -> tuple[ImageDataset, Generator, Networks, Extractor | None, dict[str, Path]]:
    """The data set, the networks, and the files of those that are pretrained on it; `started` as in `make_networks`."""
    dataset = open_data(config)
    # Before the networks that draw their weights: a run's seed decides them.
    torch.manual_seed(config.training.seed)
    generator = make_generator(config).to(device)
    if not config.needs.features:
        made = make_networks(config, started=started)
        networks = {name: network.to(device) for name, network in made.items()}
        return dataset, generator, networks, None, {}
    pretrained = pretrained_files(config, dataset, device, run.extractor, ranks)
    extractor = make_extractor(config, dataset, device, pretrained, ranks)
    check_features(config, extractor, len(dataset))
    return dataset, generator, {}, extractor, pretrained


def _check_new(run: RunFolder) -> None:
    try:
        run.check_new()
    except InputError as error:
        hint = "; --resume resumes it" if run.config.exists() else ""
        raise InputError("out", f"{run.path} {error.message}{hint}") from None


@memory_advice(
    "--plan lists what smaller chunks need, --chunk-size auto takes what fits (also with --resume), and a smaller "
    "--batch-size needs less"
)
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, train, close."""
    arguments = parser().parse_args(argv)
    with job() as ranks:
        _main(arguments, ranks)


def _main(arguments: argparse.Namespace, ranks: Ranks) -> None:
    asked = configure(arguments)
    check_ranks(asked, ranks, {"out": arguments.out, "resume": arguments.resume})
    if arguments.plan:
        print_plans(asked, planned_device(asked), ranks)
        return
    device = ranks.device(choose_device(asked.training.device, asked.training.threads, asked.training.float32))
    check_precision(amp_dtype(asked), device)
    check_graph(asked, device)
    if asked.validation.evaluate_every is not None:
        require("torch_fidelity", "evaluation")  # rather missing now than after the extractor has been trained
    with shared_folder(arguments.out, asked.preset, ranks) as run:
        if not arguments.resume:
            if ranks.rank == 0:
                _check_new(run)
            _train(asked, run, device, None, ranks)
            return
        if ranks.rank == 0:
            run.remove_leftovers()
        checkpoint = run.newest_checkpoint()
        if checkpoint is None or not _is_finished(run, checkpoint, asked.training.steps, ranks):
            _train(asked, run, device, checkpoint, ranks)


def _is_finished(run: RunFolder, checkpoint: Checkpoint, steps: int, ranks: Ranks) -> bool:
    """Whether nothing is left to do, which rank 0 says; InputError if more than `steps` have been taken."""
    if checkpoint.step > steps:
        raise InputError("steps", f"{run.path} has taken {checkpoint.step} steps already; give a larger number")
    newer = saved_step(run.generator) or 0
    if newer > checkpoint.step and ranks.rank == 0:
        log.warning(
            "warning: %s is of step %d and the newest checkpoint of step %d: the steps between are trained again",
            run.generator,
            newer,
            checkpoint.step,
        )
    if checkpoint.step < steps or not run.is_complete(steps):
        return False
    if ranks.rank > 0:
        return True
    if not run.loss_plot.exists():
        _plot(run)
    falls = Config.load(run.config).updates.lr_schedule != "constant"  # to an end that was fixed from the start
    longer = "" if falls else f"; to train longer: {resume_command(run.path)} --steps N"
    log.info("%s is finished, all %d steps%s", run.path, steps, longer)
    return True


def _train(asked: Config, run: RunFolder, device: torch.device, checkpoint: Checkpoint | None, ranks: Ranks) -> None:
    begun = time.perf_counter()
    # What is kept is what "auto" chose: a resumed run takes the same chunk, and so goes on in the same bits.
    config = choose_chunk(asked, device, ranks)
    trainer = build(config, run, device, checkpoint, ranks)
    check_same_step(trainer.step, ranks)
    ranks.watch()
    try:
        if trainer.step < asked.training.steps:
            trainer.fit()
        else:
            trainer.save_generator()
    except Interrupted as interruption:
        raise Interrupted(f"{interruption}; resume with: {resume_command(run.path)}", interruption.status) from None
    except WriteError as error:
        again = f"once it can be written, resume with: {resume_command(run.path)}"
        raise WriteError(error.argument, f"{error.message}; {again}") from None
    if ranks.rank > 0:
        return
    plotted = _plot(run)
    save_png(run.final_samples, trainer.picture())
    log.info(
        "done in %.0f s\nsamples: %s\n%smore:    python -m engine.sample --run %s --count 1000 --out samples.npy",
        time.perf_counter() - begun,
        run.final_samples,
        f"loss:    {run.loss_plot}\n" if plotted else "",
        shlex.quote(str(run.path)),
    )


def _plot(run: RunFolder) -> bool:
    metrics = list(run.read_metrics())
    return bool(metrics) and plot_metrics(run.loss_plot, metrics)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        products = "TF32" if torch.backends.cudnn.allow_tf32 else "IEEE"
        return f"{torch.cuda.get_device_name(device)} ({products} products of float32)"
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


if __name__ == "__main__":
    run_command(main)
