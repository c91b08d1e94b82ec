"""A small world of data, runs and a cache, and commands that meet it, each in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from engine.configuration.command import run_command
from engine.representation.pretraining import recipe
from engine.support.errors import InputError
from engine.generation.saved import load_sampler
from engine.training.checkpoint import Checkpoint
from engine.training.stopping import exit_on_interrupt

SECONDS = 120
"""After which a command counts as one that hangs."""
STEPS = 7
"""Of the finished run."""
_BYTES = 6 * 2**30
_PRELOAD = ["torch_fidelity", "torch.utils.tensorboard", "matplotlib.figure", "jinja2", "sklearn.datasets"]
_COMMANDS = ("train", "sample", "evaluate", "report", "precompute", "pretrain", "env")
_CAPABILITIES = 0x20080522


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status, negative for the signal that killed it, and its standard error."""

    status: int
    said: str

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.said.splitlines() if re.match(r"(python -m engine\.\w+: )?error: ", line)]


def _command(name: str, argv: Sequence[str], world: Path, output: str, ready: object) -> None:
    """A command in this process, which was forked for it; pretraining takes three steps."""
    _without_privileges()
    os.environ["GFMN_CACHE"] = str(world / "cache")
    os.chdir(world)
    recipe.DEFAULT_STEPS = (3, 3)
    sys.stdout.flush()
    os.dup2(os.open(world.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), 2)
    if output == "a closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(output, os.O_WRONLY)
    os.dup2(writing, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    exit_on_interrupt()
    ready.set()  # type: ignore[attr-defined]
    run_command(importlib.import_module(f"engine.{name}").main, argv)


def _without_privileges() -> None:
    """Root ignores the modes of files, by two of its capabilities."""
    if os.geteuid() == 0 and sys.platform == "linux":
        header, none = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, none):
            raise OSError(ctypes.get_errno(), "capset")


class World:
    """Data, a finished run, one that stopped half-way, and a cache, all in `path`; `renew` makes all as it was."""

    def __init__(self, base: Path):
        self.path, self.template, self._said = base / "world", base / "template", base / "said"
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload([f"engine.{name}" for name in _COMMANDS] + _PRELOAD)
        self.path.mkdir()
        (self.path / "cache").mkdir()
        pictures = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
        np.save(self.path / "digits.npy", pictures.repeat(2, axis=1).repeat(2, axis=2))
        (self.path / "photos").mkdir()
        for index, picture in enumerate(pictures[:4]):
            Image.fromarray(picture).save(self.path / "photos" / f"{index}.png")
        self._train()
        saved = sorted((self.path / "finished/checkpoints").glob("step_*"))
        self.generators = {step: tensors(path, "ema/module.") for step, path in enumerate(saved, 1)}
        self.path.rename(self.template)

    @property
    def flags(self) -> list[str]:
        """Of a run of a few quick steps."""
        return f"""--preset digits --data {self.path / "digits.npy"} --batch-size 2 --layers 1 --nz 4 --loader torch
            --kernels reference --log-every 1 --sample-every 2 --checkpoint-every 1 --threads 1""".split()

    def _train(self) -> None:
        judge = self.path / "judge.safetensors"
        self._must("pretrain", ["--preset", "digits", "--steps", "2", "--threads", "1", "--out", str(judge)])
        judged = ["--evaluate-every", "2", "--evaluate-samples", "4", "--evaluate-extractor", "vgg-small"]
        flags = [*self.flags, "--weights", "pretrain", *judged, "--evaluate-weights", str(judge)]
        self._must("train", [*flags, "--steps", str(STEPS), "--keep-checkpoints", "9", "--out", "finished"])
        self._must("train", [*flags, "--steps", "4", "--out", "half"])
        config = self.path / "half/config.json"
        config.write_text(config.read_text().replace('"steps": 4', '"steps": 6'))

    def _must(self, name: str, argv: Sequence[str]) -> None:
        ended = self.run(name, argv)
        assert ended.status == 0, ended.said

    def renew(self) -> None:
        """Everything as it was."""
        self.readable()
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.template, self.path)

    def readable(self) -> None:
        """Give all files the modes back that damage took from them."""
        if not self.path.exists():
            return
        for path in (self.path, *self.path.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o700)

    def run(self, name: str, argv: Sequence[str], *, output: str = os.devnull, kill: tuple[float, int] | None = None):
        """Run a command; with `kill` send it that signal after so many seconds."""
        ready = self._forks.Event()
        process = self._forks.Process(target=_command, args=(name, list(argv), self.path, output, ready))
        process.start()
        if kill is not None:
            ready.wait()
            process.join(kill[0])
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, kill[1])
        process.join(SECONDS)
        hangs = process.is_alive()
        process.kill()
        process.join()
        said = self._said.read_text(errors="backslashreplace")
        return Ended(-signal.SIGALRM if hangs else process.exitcode, said)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below, by its path."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def worth(run: Path) -> tuple[int, int, int]:
    """The steps of a run's newest whole checkpoint, of its generator and of its best one; −1 for none."""
    steps = [-1]
    for path in (run / "checkpoints").glob("*.safetensors"):
        with contextlib.suppress(InputError):
            steps.append(Checkpoint.load(path).step)
    generators = []
    for name in ("generator.safetensors", "generator_best.safetensors"):
        try:
            generators.append(load_sampler(run / name).step)
        except InputError:
            generators.append(-1)
    return (max(steps), *generators)


def tensors(path: Path, prefix: str = "") -> dict[str, bytes]:
    """The values in a file whose names begin so, without that beginning."""
    found = load_file(path)
    return {
        name.removeprefix(prefix): value.numpy().tobytes() for name, value in found.items() if name.startswith(prefix)
    }
