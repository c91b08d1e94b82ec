"""A run that has taken all its steps: what resuming it says, and what a longer one leaves of its pictures."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
from helpers.runs import command

from engine import train
from engine.training.run_folder import saved_step

pytestmark = pytest.mark.usefixtures("own_cache")


def stop(error: type[BaseException], *_: object) -> None:
    raise error


def test_pictures_of_a_longer_run_are_drawn_again(finished: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Also if it is stopped between its generator and them; the shorter run's are no longer shown then."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with monkeypatch.context() as patched:
        patched.setattr(train, "_plot", functools.partial(stop, KeyboardInterrupt))
        assert command(train.main, ["--resume", "--out", str(run), "--steps", "8"], capsys)[0] == 130
    assert saved_step(run / "generator.safetensors") == 8
    assert not (run / "samples.png").exists()
    assert not (run / "loss.png").exists()
    train.main(["--resume", "--out", str(run), "--steps", "8"])
    assert (run / "samples.png").read_bytes() != (finished / "samples.png").read_bytes()
    assert (run / "loss.png").exists()


@pytest.mark.parametrize(("schedule", "said"), [("constant", True), ("cosine", False)])
def test_a_finished_run_says_how_to_train_longer_where_it_can_be(
    schedule: str, said: bool, finished: Path, flags: list[str], tmp_path: Path, caplog
) -> None:
    """A rate that falls reaches its end with the steps that were fixed at the start."""
    run, argv = finished, []
    if schedule != "constant":
        run, argv = tmp_path / "run", [*flags, "--steps", "2", "--lr-schedule", schedule]
        train.main([*argv, "--out", str(run)])
    train.main(["--resume", "--out", str(run)])
    assert f"{run} is finished, all {2 if argv else 6} steps" in caplog.text
    assert ("to train longer" in caplog.text) is said
