"""`python -m engine.env`: versions, machine, optional parts and kernel backends, for a bug report.

Works with only the core installed, and when a part is broken: then its line says so. Nothing is compiled, downloaded or
written.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import contextlib
import functools
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from engine import __version__
from engine.configuration.command import Parser, run_command
from engine.support.errors import EXTRAS, pip_line

CORE = ("torch", "torchvision", "triton", "numpy", "pillow", "scikit-learn", "safetensors", "tqdm")
BACKENDS = ("triton", "compiled", "reference", "auto")

Facts = dict[str, dict[str, str]]
"""Section → what → its value, all of it text."""


def collect() -> Facts:
    """All that is known about this installation and machine. Raises nothing: what fails is told in its place."""
    versions = {"engine": __version__, "python": platform.python_version()}
    versions |= {name: _installed(name) or "not installed" for name in CORE}
    extras = {}
    for module, (package, _) in EXTRAS.items():
        extras[package] = _installed(package) or f"not installed: {pip_line(module)}"
    return {
        "versions": versions,
        "optional": extras,
        "machine": {name: _attempt(probe) for name, probe in _MACHINE.items()},
        "kernels": {name: _attempt(functools.partial(_backend, name)) for name in BACKENDS},
    }


def text(facts: Facts) -> str:
    """The facts in aligned columns, a paragraph for each section."""
    width = max(len(name) for section in facts.values() for name in section)
    paragraphs = []
    for heading, section in facts.items():
        lines = [f"  {name:{width}}  {value}" for name, value in section.items()]
        paragraphs.append("\n".join([f"{heading}:", *lines]))
    return "\n".join(paragraphs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m engine.env",
        description="Print versions, machine, optional parts and kernel backends: what a bug report needs.",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    arguments = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else text(facts))


def _installed(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _attempt(probe: Callable[[], str]) -> str:
    """What `probe` returns, or what went wrong: a broken installation is what this command is for."""
    try:
        return _without_home(probe())
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return _without_home(f"unknown ({type(error).__name__}: {lines[0]})")


def _without_home(line: str) -> str:
    """`line` without the name of the user, who will post it."""
    home = os.path.expanduser("~")
    return line.replace(home, "~") if len(home) > 1 else line


def _system() -> str:
    libc = "-".join(part for part in platform.libc_ver() if part)
    return " ".join(part for part in (platform.system(), platform.release(), platform.machine(), libc) if part)


def _processor() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {os.cpu_count()} CPUs"


def _torch() -> Any:
    return importlib.import_module("torch")


def _arithmetic() -> str:
    precision, torch = importlib.import_module("engine.training.precision"), _torch()
    fast = precision.cpu_computes_in(torch.bfloat16)
    return f"{torch.backends.cpu.get_cpu_capability()}, {'bf16' if fast else 'no fast bf16: float32 beats --amp'}"


def _threads() -> str:
    return f"{_torch().get_num_threads()} of PyTorch"


def _gpus() -> str:
    cuda = _torch().cuda
    if not cuda.is_available():
        return "none: PyTorch sees no CUDA device"
    names = []
    for index in range(cuda.device_count()):
        properties = cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        names.append(f"{properties.name} ({capability}, {properties.total_memory / 2**30:.0f} GiB)")
    return "; ".join(names)


def _cuda() -> str:
    torch = _torch()
    if torch.version.cuda is None:
        return "PyTorch is built without CUDA"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return f"PyTorch is built for CUDA {torch.version.cuda}" + (f", cuDNN {cudnn}" if cudnn else "")


def _compiler() -> str:
    path = _compiler_path()
    if path is None:
        return f"none: {_compiler_name()} is not on the PATH"
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
    return f"{path}: {answer.stdout.splitlines()[0]}"


def _compiler_name() -> str:
    """The C++ compiler that Inductor runs."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def _compiler_path() -> str | None:
    return shutil.which(_compiler_name())


def _cache() -> str:
    folder = importlib.import_module("pipelines").named_cache_folder()
    if folder is None:
        return "none: this user has no home folder; set GFMN_CACHE"
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    usable = existing.is_dir() and os.access(existing, os.W_OK)
    return f"{folder}" + ("" if usable else ", which cannot be written to")


_MACHINE: dict[str, Callable[[], str]] = {
    "system": _system,
    "processor": _processor,
    "arithmetic": _arithmetic,
    "threads": _threads,
    "GPUs": _gpus,
    "CUDA": _cuda,
    "C++ compiler": _compiler,
    "cache": _cache,
}


def _backend(name: str) -> str:
    """Whether the kernels backend `name` can run, or which one "auto" is. Nothing is compiled for the answer."""
    torch, kernels = _torch(), importlib.import_module("kernels")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "auto":
        name = "triton" if device.type == "cuda" else "compiled"
        return name if _backend(name).startswith("available") else "reference"
    if name == "compiled":
        if device.type != "cpu":
            return "for CPUs only; this machine has a GPU"
        if _compiler_path() is None:
            return f"unavailable: no C++ compiler ({_compiler_name()}) on the PATH"
        return "available, if the compiler builds its code (tried when training starts)"
    try:
        kernels.select(name, device, torch.float32)
    except ValueError as error:
        return f"unavailable: {str(error).rpartition('cannot run here: ')[2]}"
    return "available"


if __name__ == "__main__":
    run_command(main)
