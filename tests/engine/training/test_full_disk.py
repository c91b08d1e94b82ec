"""A disk that fills up, and a folder that goes away, in the middle of a run: one line, and the run goes on later.

`/dev/full` in the place of a file is a disk that is full for that file alone: the kernel refuses every write.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import command, metrics, same_run

from engine import train
from engine.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("own_cache")


def at_step(step: int, act: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Do `act` as soon as training has taken `step` steps."""
    take = Trainer.train_step

    def acting(self: Trainer):
        taken = take(self)
        if self.step == step:
            act()
        return taken

    patch.setattr(Trainer, "train_step", acting)


def fill(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


# The file for which there is no room from step 3 on; the step of the newest checkpoint when the run has ended.
OUTPUTS = {
    "metrics.jsonl": 3,
    "samples/step_00000003.png": 3,
    "checkpoints/step_00000004.safetensors": 2,
    "generator.safetensors": 4,
    "profile.json": 4,
    "loss.png": 6,
    "samples.png": 6,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_cannot_be_written_ends_the_run_resumably(
    name: str, flags, finished: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(3, lambda: fill(out / name), patch)
        more = ["--profile", "2"] if name == "profile.json" else []
        status, errors = command(train.main, [*flags, *more, "--out", str(out)], capsys)
    assert status == 2
    assert [line for line in errors.splitlines() if name in line] == errors.splitlines()[-1:]
    assert "Traceback" not in errors
    assert (out / name).is_symlink()
    (out / name).unlink()
    newest = max(path.stem for path in (out / "checkpoints").glob("step_*"))
    assert int(newest.removeprefix("step_")) == OUTPUTS[name]
    train.main(["--resume", "--out", str(out)])
    if name == "metrics.jsonl":  # what was logged lay there
        assert [row[0] for row in metrics(out)] == [4, 5, 6]
        shutil.copy(finished / name, out / name)
    assert same_run(finished, out)
    assert all((out / name).stat().st_size for name in ("loss.png", "samples.png"))


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["a full disk", "no folder"])
def test_without_tensorboard_after_one_warning(
    what: str, flags, finished: Path, tmp_path: Path, monkeypatch, caplog
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    out = tmp_path / "run"
    if what == "a full disk":
        at_step(3, lambda: monkeypatch.setattr(RecordWriter, "write", full), monkeypatch)
    else:
        monkeypatch.setattr(Path, "mkdir", refusing("tensorboard"))
    with caplog.at_level("WARNING"):
        train.main([*flags, "--out", str(out)])
    assert [str(out / "tensorboard") in record.getMessage() for record in caplog.records] == [True]
    assert same_run(finished, out)


def refusing(name: str) -> Callable[..., None]:
    mkdir = Path.mkdir

    def refuse(self: Path, *arguments, **options) -> None:
        if self.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        mkdir(self, *arguments, **options)

    return refuse


def test_a_removed_folder_comes_back_with_a_checkpoint(flags, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(3, lambda: shutil.rmtree(out), patch)
        status, errors = command(train.main, [*flags, "--out", str(out)], capsys)
    assert status == 2
    assert "metrics.jsonl" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    train.main(["--resume", "--out", str(out)])
    assert metrics(out)[-1][0] == 6


def test_a_resumed_run_hides_the_events_of_steps_that_are_taken_again(flags, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train.main([*flags, "--out", str(out)])
    for path in (out / "checkpoints").glob("step_00000006*"):
        path.unlink()
    train.main(["--resume", "--out", str(out)])
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
