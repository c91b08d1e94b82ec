"""kill -9 at any moment of training: the run can always be resumed, and ends as the one that was never killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.marks import slow
from helpers.runs import metrics, same_run, start
from safetensors.torch import save_file

from engine import train
from engine.configuration.command import run_command
from engine.representation.architectures import find_architecture
from engine.representation.pretraining import recipe

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("victim", ["checkpoint", slow("generator"), "config", "target"])
def test_kill_in_the_middle_of_writing_a_file(victim: str, flags: list[str], finished: Path, tmp_path: Path) -> None:
    """kill -9 after a file's bytes were written and before it took its place."""
    name, nth = {
        "checkpoint": ("step_", 2),
        "generator": ("run/generator", 2),
        "config": ("config", 1),
        "target": ("run/target", 1),
    }[victim]
    prelude = f"""
import os, signal
replace, seen = os.replace, []
def replace_or_die(source, target):
    if {name!r} in str(target):
        seen.append(target)
        if len(seen) == {nth}:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
"""
    out = tmp_path / "run"
    process = start([*flags, "--out", str(out)], prelude)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert list(out.rglob(".*.tmp"))
    # Killed over its configuration, the run had not begun: the folder counts as new.
    train.main([*flags, "--out", str(out)] if victim == "config" else ["--resume", "--out", str(out)])
    assert same_run(finished, out)
    assert not list(out.rglob(".*.tmp"))


def run_alone(argv: list[str], cache: Path, said: Path) -> None:
    """A training command in this process, which was forked for it; pretraining takes three steps."""
    os.environ["GFMN_CACHE"] = str(cache)
    recipe.DEFAULT_STEPS = (3, 3)
    sys.stdout.flush()
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    run_command(train.main, argv)


@pytest.mark.parametrize("kills", [3, slow(500)])
def test_kill_at_any_moment(kills: int, flags: list[str], tmp_path: Path) -> None:
    """Of all that a run does: pretraining, the pass over the data set, training, evaluation and its last files."""
    # Processes that are forked after the imports, which would take most of the time.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["engine.train", "torch_fidelity", "torch.utils.tensorboard", "matplotlib.figure"])
    judge, whole, cache, said = (tmp_path / name for name in ("judge.safetensors", "whole", "cache", "said"))
    flags = [*flags, "--weights", "pretrain", "--checkpoint-every", "2"]
    save_file(find_architecture("vgg-small", 32).make(2, 32).state_dict(), judge)
    judged = ["--evaluate-every", "3", "--evaluate-samples", "8", "--evaluate-extractor", "vgg-small"]
    flags += [*judged, "--evaluate-weights", str(judge)]

    def attempt(out: Path, wait: float | None) -> bool:
        """Whether the run came to its end before it was killed; it never ends otherwise."""
        argv = ["--resume", "--out", str(out)] if (out / "config.json").exists() else [*flags, "--out", str(out)]
        process = forks.Process(target=run_alone, args=(argv, cache, said))
        process.start()
        process.join(wait)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), said.read_text()
        return process.exitcode == 0

    imported = forks.Process(target=time.sleep, args=(0,))
    imported.start()
    imported.join()
    before = time.monotonic()
    assert attempt(whole, None), said.read_text()
    longest = 1.2 * (time.monotonic() - before)
    draw, killed, runs = random.Random(0), 0, 0
    while killed < kills:
        shutil.rmtree(cache)
        out, runs = tmp_path / f"run {runs}", runs + 1
        while not attempt(out, draw.uniform(0, longest) if killed < kills else None):
            killed += 1
        assert same_run(whole, out)
        names = ["generator_best.safetensors", "target.safetensors", "extractor/vgg-small.safetensors", "samples.png"]
        assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
        assert metrics(out) == metrics(whole)
        assert not [path for pattern in (".*.tmp", ".lock") for path in out.rglob(pattern)]
        shutil.rmtree(out)
