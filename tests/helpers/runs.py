"""Helpers: runs of the training command, and what two of them have in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from engine import train
from engine.configuration.command import run_command
from engine.configuration.config import Config
from engine.generation.networks import build_generator
from engine.generation.priors import Gaussian
from engine.generation.sampling import Sampler
from engine.generation.saved import save_sampler
from engine.training.run_folder import RunFolder

DETERMINISTIC = ("step", "loss", "loss_mean", "loss_variance", "difference_norm")


def metrics(run: Path, names: Sequence[str] = DETERMINISTIC) -> list[tuple]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in names) for line in lines]


def same_run(one: Path, other: Path, names: Sequence[str] = DETERMINISTIC) -> bool:
    weights = (one / "generator.safetensors").read_bytes() == (other / "generator.safetensors").read_bytes()
    return weights and metrics(one, names) == metrics(other, names)


def command(main: Callable, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the lines on standard error of a command that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_command(main, argv)
    return int(exit_.value.code or 0), capsys.readouterr().err


def refusal(given: Sequence[str], data: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which training on the pictures `data` refuses what is `given`; asserts that nothing was begun."""
    text = f"--data {data} --batch-size 4 --nz 8 --loader torch --threads 1 --steps 1"
    code, errors = command(train.main, [*text.split(), *given, "--out", str(run)], capsys)
    assert code == 2
    assert not (run / "config.json").exists()
    return errors.splitlines()[-1]


def start(
    argv: Sequence[str], prelude: str = "", *, module: str = "engine.train", **environment: str
) -> subprocess.Popen[str]:
    """A command in a process of its own, after the Python statements of `prelude`."""
    run = f"from engine.configuration.command import run_command\nfrom {module} import main\nrun_command(main)"
    script = f"{prelude}\nimport sys\n{run}"
    return subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def untrained(folder: Path, *, image_size: int = 32, nz: int = 8, **settings: object) -> Path:
    """The folder of a run that never trained; its generator draws noise all the same."""
    run = RunFolder(folder)
    run.write_config(Config.build("digits", {"image_size": image_size, "nz": nz, **settings}).to_json())
    with torch.random.fork_rng():
        torch.manual_seed(2)
        generator = build_generator("dcgan", image_size=image_size, nz=nz)
    save_sampler(run.generator, Sampler(Gaussian(nz), generator), 17)
    return folder
