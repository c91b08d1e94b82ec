"""Pretrain an extractor: python -m engine.pretrain --preset digits --out extractor.safetensors

The file that it writes is what `--weights` of engine.train takes.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.configuration.command import Parser, arguments_as, memory_advice, run_command
from engine.configuration.config import Config
from engine.configuration.flags import add_flags, given_flags
from engine.configuration.groups import DataConfig, TrainingConfig
from engine.configuration.inputs import check_precision, check_same_settings, choose_device
from engine.configuration.presets import preset_for
from engine.representation.architectures import ARCHITECTURES
from engine.representation.pretraining import TASKS, PretrainResult, pretrain
from engine.support.errors import InputError, Interrupted
from engine.support.files import check_output, expanded, locked
from engine.training.job import job
from engine.training.precision import AMP_DTYPES
from engine.training.ranks import Ranks
from pipelines import ImageDataset, open_dataset

__all__ = ["PretrainResult", "main", "pretrain"]

# The paper's classifiers see random crops and mirrored images (supplement). Digits are not mirrored: that would be
# other symbols. How many epochs is our choice.
_PHOTOS = {"arch": "vgg19", "batch_size": 128, "horizontal_flip": True}
_PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"arch": "vgg-small"},
    "photos": {"arch": "vgg19"},
    "cifar10": {**_PHOTOS, "epochs": 60},
    "stl10": {**_PHOTOS, "task": "rotate", "epochs": 30},  # its training images have no labels
    "celeba64": {**_PHOTOS, "task": "autoencode", "arch": "dcgan-encoder", "epochs": 20},
    "celeba128": {**_PHOTOS, "task": "autoencode", "arch": "dcgan-encoder", "epochs": 20},
    "lsun64": {**_PHOTOS, "task": "autoencode", "arch": "dcgan-encoder", "epochs": 5},
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m engine.pretrain",
        description=f"{__doc__.splitlines()[0]}. In several processes, the same run on any number of them: torchrun "
        "--nproc-per-node N -m engine.pretrain ...",
    )
    add = parser.add_argument
    add(
        "--preset",
        choices=tuple(_PRESETS),
        help="data set and settings (default: photos with --data, else digits); those named after sets of photographs "
        "mirror images",
    )
    add("--out", type=expanded, required=True, metavar="FILE", help="the weights, safetensors")
    add("--resume", action="store_true", help="continue from the checkpoint of an interrupted run")
    section = parser.add_argument_group("pretraining", "Defaults are the preset's.")
    add = section.add_argument
    unset = argparse.SUPPRESS
    add(
        "--task",
        choices=tuple(TASKS),
        default=unset,
        help="rotate and autoencode need no labels; tinted is classify for grey images, whose features answer to hue, "
        "too (default: classify)",
    )
    add("--arch", default=unset, metavar="NAME", help=f"one of {', '.join(ARCHITECTURES)}")
    add("--epochs", type=int, default=unset, metavar="N", help="passes over the training images")
    add("--steps", type=int, default=unset, metavar="N", help="training steps, instead of --epochs")
    add(
        "--batch-size",
        type=int,
        default=unset,
        metavar="N",
        help="images in a batch (default: 64; presets named after sets of photographs: 128)",
    )
    add("--lr", type=float, default=unset, metavar="X", help="peak rate (default: 0.1; autoencode: 0.001 with Adam)")
    add("--momentum", type=float, default=unset, metavar="X", help="of SGD (default: 0.9; autoencode: none)")
    add("--weight-decay", type=float, default=unset, metavar="X", help="(default: 5e-4; autoencode: 0)")
    add("--crop-padding", type=int, default=unset, metavar="PIXELS", help="of the random crops (default: 4)")
    add("--amp", action="store_true", default=unset, help="mixed precision, bfloat16")
    add("--seed", type=int, default=unset, metavar="N", help="(default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add_flags(parser, "data")
    return parser


@memory_advice("a smaller --batch-size needs less")
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, pretrain the network, and save its weights."""
    arguments = _parser().parse_args(argv)
    with job() as ranks:
        _main(arguments, ranks)


def _main(arguments: argparse.Namespace, ranks: Ranks) -> None:
    given = given_flags(arguments)
    preset = arguments.preset or preset_for(given)
    data = Config.build(preset, {name: given[name] for name in given if name in _DATA_FLAGS}).data
    TrainingConfig(**{name: given[name] for name in given if name in _CHECKED_FLAGS})
    of_preset = data.dataset == Config.build(preset, {}).data.dataset
    # Another data set than the preset's takes nothing from it but the image size, and of pictures the crop.
    values: dict[str, Any] = {**_PRESETS[preset]} if of_preset else {"arch": "vgg19"}
    if "steps" in vars(arguments):
        values.pop("epochs", None)
    values |= {name: value for name, value in vars(arguments).items() if name in _PRETRAIN_FLAGS}
    values["flip"] = given.get("horizontal_flip", values.pop("horizontal_flip", False))
    own = {name: getattr(arguments, name) for name in ("out", "resume", "device", "threads")}
    check_same_settings({**dataclasses.asdict(data), **values, **own}, ranks)
    with _owned(arguments.out, ranks):
        _pretrain(arguments, data, values, ranks)


@contextlib.contextmanager
def _owned(out: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, this job alone writes `out`; rank 0 does it."""
    if ranks.rank > 0:
        yield
        return
    check_output(out, "out", example="extractor.safetensors", plain=True)
    with locked(out.with_name(f".{out.name}.lock"), lambda: _busy(out)):
        yield


def _pretrain(arguments: argparse.Namespace, data: DataConfig, values: dict[str, Any], ranks: Ranks) -> None:
    out, resume = arguments.out, arguments.resume
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    done, *_ = ranks.meet("done", ranks.rank == 0 and _is_done(out, checkpoint, resume))
    if done:
        if ranks.rank == 0:
            print(f"{out}: is complete, nothing to resume")
        return
    device = ranks.device(choose_device(arguments.device, arguments.threads))
    check_precision(AMP_DTYPES["bf16"] if values.get("amp") else None, device, "amp")
    # Rank 0 first: it downloads and digests, and the others find the results in the cache.
    dataset = ranks.first("dataset", lambda: _open(data, digest=ranks.size > 1))
    ranks.watch()
    try:
        with arguments_as(architecture="arch", flip="horizontal_flip"):
            result = pretrain(
                values.pop("arch"),
                dataset,
                **values,
                loader=data.loader,
                device=device,
                checkpoint=checkpoint,
                resume=resume,
                ranks=ranks,
            )
    except Interrupted as interruption:
        raise Interrupted(f"{interruption}; --resume continues from there", interruption.status) from None
    if ranks.rank > 0:
        return
    result.save(out)
    checkpoint.unlink(missing_ok=True)
    print(f"{result.metric.replace('_', ' ')} on held-out images: {result.validation:.4f}")
    print(f"weights of {result.metadata['architecture']}: {out}")


def _open(data: DataConfig, *, digest: bool) -> ImageDataset:
    dataset = open_dataset(
        data.dataset,
        data.data,
        image_size=data.image_size,
        center_crop=data.center_crop,
        skip_bad_images=data.skip_bad_images,
    )
    if digest:
        dataset.fingerprint()
    return dataset


_DATA_FLAGS = {entry.name for entry in dataclasses.fields(DataConfig)} - {"horizontal_flip"}
_CHECKED_FLAGS = ("batch_size", "steps", "lr", "seed")
"""Those of pretraining that have the same limits as in training."""
_PRETRAIN_FLAGS = (
    "task", "arch", "epochs", "steps", "batch_size", "lr", "momentum", "weight_decay", "crop_padding", "amp", "seed",
)  # fmt: skip


def _is_done(out: Path, checkpoint: Path, resume: bool) -> bool:
    """Whether the run that is resumed is complete; InputError if something would be overwritten."""
    if resume:
        return out.exists() and not checkpoint.exists()
    for file in (out, checkpoint):
        if file.exists():
            raise InputError("out", f"{file} exists; resume that run (--resume), delete it, or name another file")
    return False


def _busy(out: Path) -> None:
    raise InputError("out", f"another process is pretraining {out}; wait until it ends, or name another file")


if __name__ == "__main__":
    run_command(main)
