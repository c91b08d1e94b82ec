"""What every command opens: the device, the real images, a run's generator. Nothing here knows what is trained for."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine import __version__
from engine.configuration.config import Config
from engine.configuration.options import MOST_SEED
from engine.configuration.train_command import resume_command
from engine.generation.saved import SavedSampler, load_sampler
from engine.representation.encoders import build_encoder
from engine.representation.zoo import has_imagenet_weights
from engine.support.errors import InputError
from engine.support.files import what_is
from engine.training.precision import AMP_DTYPES, cpu_computes_in
from engine.training.ranks import Ranks
from engine.training.run_folder import RunFolder
from pipelines import ImageDataset, open_dataset

log = logging.getLogger("gfmn")

_THREADS_PER_CORE = 4
"""More than that only wait for each other, and many more end the process without a word."""


def most_threads() -> int:
    """How many CPU threads this machine takes."""
    return _THREADS_PER_CORE * (os.cpu_count() or 1)


def neighbours(size: int) -> int:
    """Ranks of a job of `size` that share this machine's memory, as `torchrun` says: all, if it doesn't."""
    return min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def check_seed(seed: int) -> None:
    """InputError unless `seed` is one that every source of random numbers takes, and tells from others."""
    if not 0 <= seed <= MOST_SEED:
        raise InputError("seed", f"must be from 0 to {MOST_SEED}, got {seed}")


def choose_device(name: str, threads: int | None = None, float32: str = "tf32") -> torch.device:
    """The device "auto", "cpu" or "cuda", with `threads` on a CPU, and float32 convolutions as `float32` says on CUDA.

    InputError if it is not there, or there are too many threads.
    """
    torch.backends.cudnn.allow_tf32 = float32 == "tf32"
    if threads is not None:
        if not 1 <= threads <= most_threads():
            raise InputError("threads", f"must be from 1 to {most_threads()} on this machine, got {threads}")
        torch.set_num_threads(threads)
    if name == "cpu":
        return torch.device(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old driver PyTorch warns in its own words, in several lines
        if torch.cuda.is_available():
            return torch.device("cuda")
    unusable = _unusable_gpu()
    if name == "cuda":
        raise InputError(
            "device", f"cuda is not available here ({unusable or 'no GPU, or no driver'}); use --device cpu"
        )
    if unusable is not None:
        log.warning("warning: %s; the CPU is used", unusable)
    return torch.device("cpu")


def _unusable_gpu() -> str | None:
    """A device file that PyTorch could make nothing of, and what may be wrong; None without one, or if it is hidden."""
    file = next(iter(sorted(Path("/dev").glob("nvidia[0-9]*"))), None)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if file is None or hidden:
        return None
    if torch.version.cuda is None:
        return f"{file} is there, but this PyTorch is built without CUDA"
    return f"{file} is there, but PyTorch for CUDA {torch.version.cuda} cannot use it (is the driver too old?)"


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


def known_weights(name: str, *others: str) -> str:
    """What may be given as weights of the network `name`, or of several joined by +, for people: `others`, and words.

    "imagenet" is among these if all of them have such weights.
    """
    found = [*others, *(["'imagenet'"] if all(map(has_imagenet_weights, name.split("+"))) else [])]
    return ", ".join([*found, f"{'or ' if found else ''}'random' if you mean it"])


def amp_dtype(config: Config) -> torch.dtype | None:
    """The low precision of the run, None without mixed precision."""
    return AMP_DTYPES[config.training.amp_dtype] if config.training.amp else None


# The oldest compute capabilities with arithmetic in these dtypes; slower is no error.
_CAPABILITIES = {torch.float16: (5, 3), torch.bfloat16: (8, 0)}


def check_precision(dtype: torch.dtype | None, device: torch.device, argument: str = "amp_dtype") -> None:
    """InputError on `argument` if the low precision `dtype` is one that the GPU has no arithmetic for; on such a CPU,
    which computes in it all the same, a warning."""
    if dtype is None:
        return
    name = next(name for name, known in AMP_DTYPES.items() if known == dtype)
    if device.type != "cuda":
        if not cpu_computes_in(dtype):
            log.warning("warning: this CPU has no fast %s: float32 is far faster, without --amp", name)
        return
    own, needed = torch.cuda.get_device_capability(device), _CAPABILITIES[dtype]
    if own < needed:
        half = argument == "amp_dtype" and own >= _CAPABILITIES[torch.float16]
        raise InputError(
            argument,
            f"{name} needs a GPU of compute capability {needed[0]}.{needed[1]} or newer, and "
            f"{torch.cuda.get_device_name(device)} has {own[0]}.{own[1]}; "
            + ("--amp-dtype fp16 runs there" if half else "leave out --amp"),
        )


def check_graph(config: Config, device: torch.device) -> None:
    """InputError if the run asks for a CUDA graph where there is none."""
    if not config.training.cuda_graph:
        return
    if device.type != "cuda":
        raise InputError("cuda_graph", f"needs a CUDA device, and this run is on the {device.type.upper()}")
    if config.matching.backend not in ("auto", "triton"):
        raise InputError("cuda_graph", f"needs the Triton kernels, not --kernels {config.matching.backend}")
    if not config.needs.captured:
        raise InputError("cuda_graph", f"--method {config.method.method} cannot be captured: its steps need the host")


def check_ranks(config: Config, ranks: Ranks, arguments: Mapping[str, object] | None = None) -> None:
    """InputError unless all ranks run one version with one set of settings, and each has images of a minibatch.

    Args:
        arguments: further ones that all ranks were started with, by name.
    """
    if ranks.size == 1:
        return
    batch = config.training.batch_size
    if batch < ranks.size:
        raise InputError("batch_size", f"a minibatch of {batch} is too small for {ranks.size} processes")
    check_whole_batches(config, ranks)
    check_same_settings({**config.flat(), **(arguments or {})}, ranks)


def check_whole_batches(config: Config, ranks: Ranks) -> None:
    """InputError if several processes would share minibatches whose statistics the extractor takes."""
    if config.needs.features and config.networks.extractor_bn == "batch" and ranks.size > 1:
        raise InputError("extractor_bn", f"batch statistics need the whole minibatch in one process, not {ranks.size}")


def check_same_settings(settings: Mapping[str, Any], ranks: Ranks) -> None:
    """InputError unless all ranks run one version of the engine and of PyTorch with these settings."""
    versions = {"version": __version__, "PyTorch": str(torch.__version__)}
    first, *others = ranks.meet("settings", {**versions, **{name: str(value) for name, value in settings.items()}})
    found = []
    for rank, theirs in enumerate(others, start=1):
        names = [name for name in {**first, **theirs} if theirs.get(name) != first.get(name)]
        different = "; ".join(f"{name} {theirs.get(name)}, not {first.get(name)}" for name in names)
        if different:
            found.append(f"process {rank} was started otherwise than process 0, with {different}")
    if found:
        raise InputError("", "; ".join(found))


def check_same_step(step: int, ranks: Ranks) -> None:
    """Wait for all ranks; InputError unless they resume from the same step."""
    first, *others = ranks.meet("begun", step)
    for rank, theirs in enumerate(others, start=1):
        if theirs != first:
            raise InputError(
                "out",
                f"process {rank} found the checkpoint of step {theirs} there and process 0 that of step {first}; all "
                "machines need one run folder, on a file system that they share",
            )


def load_run_sampler(path: str | Path, *, best: bool = False) -> SavedSampler:
    """The newest generator of a run's folder, or with `best` the one that was closest to the real images in training.

    InputError on "run" if the folder holds no run, or on "best" if the run was not evaluated.
    """
    run = RunFolder(path)
    if what_is(run.path) != "folder":
        raise InputError("run", f"{run.path} is not a folder")
    wanted = run.best_generator if best else run.generator
    if what_is(wanted) is None:
        if what_is(run.generator) is not None:
            raise InputError("best", f"{run.path} was not evaluated during training (--evaluate-every)")
        if what_is(run.config) is None:
            raise InputError("run", f"{run.path} is not the folder of a run: it has no {run.config.name}")
        raise InputError("run", f"{run.path} has no generator yet; train it: {resume_command(run.path)}")
    return load_sampler(wanted, build_encoder)
