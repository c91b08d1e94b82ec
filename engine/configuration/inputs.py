"""What every command opens: the device, the real images, a run's generator. Nothing here knows what is trained for."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from engine.configuration.config import Config
from engine.configuration.train_command import resume_command
from engine.generation.saved import SavedSampler, load_sampler
from engine.support.errors import InputError
from engine.support.files import what_is
from engine.training.precision import AMP_DTYPES
from engine.training.run_folder import RunFolder
from pipelines import ImageDataset, open_dataset

log = logging.getLogger("gfmn")

_THREADS_PER_CORE = 4
"""More than that only wait for each other, and many more end the process without a word."""


def most_threads() -> int:
    """How many CPU threads this machine takes."""
    return _THREADS_PER_CORE * (os.cpu_count() or 1)


def check_seed(seed: int, most: int = 2**63 - 1) -> None:
    """InputError unless `seed` is one that every source of random numbers takes: 0 to `most`."""
    if not 0 <= seed <= most:
        raise InputError("seed", f"must be from 0 to {most}, got {seed}")


def choose_device(name: str, threads: int | None = None, float32: str = "tf32") -> torch.device:
    """The device "auto", "cpu" or "cuda", with `threads` on a CPU, and float32 convolutions as `float32` says on CUDA.

    InputError if it is not there, or there are too many threads.
    """
    torch.backends.cudnn.allow_tf32 = float32 == "tf32"
    if threads is not None:
        if not 1 <= threads <= most_threads():
            raise InputError("threads", f"must be from 1 to {most_threads()} on this machine, got {threads}")
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        files = sorted(Path("/dev").glob("nvidia[0-9]*"))
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # on purpose
        if name == "cpu" and files and not hidden:
            log.warning(
                "warning: %s is there, but PyTorch for CUDA %s cannot use it (is the driver too old?); the CPU is used",
                files[0],
                torch.version.cuda,
            )
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device", "cuda is not available here (no GPU, or no driver); use --device cpu")
    return torch.device(name)


def open_data(config: Config) -> ImageDataset:
    """The real images that a configuration names."""
    data = config.data
    return open_dataset(
        data.dataset,
        data.data,
        image_size=data.image_size,
        center_crop=data.center_crop,
        horizontal_flip=data.horizontal_flip,
        skip_bad_images=data.skip_bad_images,
    )


def amp_dtype(config: Config) -> torch.dtype | None:
    """The low precision of the run, None without mixed precision."""
    return AMP_DTYPES[config.training.amp_dtype] if config.training.amp else None


def load_run_sampler(path: str | Path, *, best: bool = False) -> SavedSampler:
    """The newest generator of a run's folder, or with `best` the one that was closest to the real images in training.

    InputError on "run" if the folder holds no run, or on "best" if the run was not evaluated.
    """
    run = RunFolder(path)
    if what_is(run.path) != "folder":
        raise InputError("run", f"{run.path} is not a folder")
    if what_is(run.generator) is None:
        if what_is(run.config) is None:
            raise InputError("run", f"{run.path} is not the folder of a run: it has no {run.config.name}")
        raise InputError("run", f"{run.path} has no generator yet; train it: {resume_command(run.path)}")
    if best and what_is(run.best_generator) is None:
        raise InputError("best", f"{run.path} was not evaluated during training (--evaluate-every)")
    return load_sampler(run.best_generator if best else run.generator)
