"""The folder of a run: whose it is, what lies where, and how it survives a kill at any moment."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.support.errors import InputError, reason
from engine.support.files import expanded, leftovers, locked, read_tensors, write_atomically
from engine.training.checkpoint import Checkpoint

COLUMNS = 8
"""Images in a row of the sample grids."""
_SLOW = 60.0
"""Seconds after which what one machine wrote is seen by all that share its file system; NFS remembers for so long."""


class RunFolder:
    """`config.json`, `metrics.jsonl`, `samples/`, `samples.png`, `loss.png`, `checkpoints/`, `generator.safetensors`,
    `tensorboard/`; with evaluation during training, `generator_best.safetensors` and `checkpoints/best.safetensors`.
    What a resumed run could not compute again bit for bit is kept as well: the extractors that were pretrained for it
    in `extractor/`, and `target.safetensors`.

    Everything but the metrics is written atomically. Metrics are appended; on resume, lines after the checkpoint's
    step, and lines that cannot be read, are dropped. A checkpoint is written before the generator that it holds, so a
    generator without any checkpoint means that checkpoints were lost.
    """

    def __init__(self, path: str | Path):
        self.path = expanded(path)
        self.lock = self.path / ".lock"
        self.config = self.path / "config.json"
        self.extractor = self.path / "extractor"
        self.target = self.path / "target.safetensors"
        self.bad_images = self.path / "bad_images.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.final_samples = self.path / "samples.png"
        self.loss_plot = self.path / "loss.png"
        self.checkpoints = self.path / "checkpoints"
        self.generator = self.path / "generator.safetensors"
        self.best_generator = self.path / "generator_best.safetensors"
        self.best_checkpoint = self.checkpoints / "best.safetensors"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile.json"
        self._config_text: str | None = None

    @classmethod
    def make(cls, parent: str | Path, name: str) -> RunFolder:
        """A new folder in `parent`, its name numbered if it is taken; InputError if it cannot be made."""
        for number in itertools.count():
            run = cls(Path(parent) / (f"{name}-{number}" if number else name))
            if run._mkdir():
                return run
        raise AssertionError

    def _mkdir(self) -> bool:
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            return False
        except OSError as error:
            raise InputError(self.path, f"cannot be made, {error.strerror or error}") from None
        return True

    @contextlib.contextmanager
    def owned(self, *, made: bool = False) -> Iterator[None]:
        """Inside, the folder is this process's alone. It is made if it is missing, and removed again if it stays empty.

        Args:
            made: it has just been made for this process.

        Raises InputError if it cannot be made or written to, or if another process has it.
        """
        made = self._mkdir() or made
        try:
            with locked(self.lock, self._busy):
                yield
        finally:
            if made:
                with contextlib.suppress(OSError):  # it holds a run, or has a new owner
                    self.path.rmdir()

    def mark(self) -> str:
        """Write into the lock file, which is this process's, what `check_shared` on other machines looks for there."""
        mark = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
        try:
            self.lock.write_text(mark)
        except OSError as error:
            raise InputError(self.path, f"cannot be written to, {reason(error)}") from None
        return mark

    def check_shared(self, mark: str, check: Callable[[], None]) -> None:
        """InputError unless this process, too, finds the folder whose owner's `mark` this is; waits for a slow one.

        Args:
            check: is called meanwhile; it raises to give up.
        """
        end = time.monotonic() + _SLOW
        while True:
            with contextlib.suppress(OSError, UnicodeError):
                if self.lock.read_text() == mark:
                    return
            if time.monotonic() >= end:
                owner = mark.split()[0]
                raise InputError(
                    self.path,
                    f"is not the run's folder on {socket.gethostname()} as it is on {owner}; all machines need one "
                    "run folder on a file system that they share",
                )
            check()
            time.sleep(0.2)

    def _busy(self) -> None:
        raise InputError(self.path, "another process is at this run; wait until it ends, or choose another folder")

    def check_new(self) -> None:
        """InputError if the folder already holds something. A run that had not taken a step is removed, and so is what
        a kill left behind before there was one."""
        try:
            entries = set(self.path.iterdir()) - {self.lock, *leftovers(self.path, self.config.name)}
        except OSError as error:
            raise InputError(self.path, f"cannot be read, {error.strerror or error}") from None
        before = {self.config, self.extractor, self.target, self.bad_images, self.metrics, self.tensorboard}
        stepped = self.metrics.exists() and self.metrics.stat().st_size > 0
        if entries and not self._is_ours():
            raise InputError(self.path, "is not an empty folder; choose another one")
        below = {*self.extractor.glob("*.safetensors"), *self.tensorboard.glob("events.out.tfevents.*")}
        found = {path for folder in (self.extractor, self.tensorboard) for path in folder.glob("*")}
        if stepped or (entries | found) - before - below - set(self._leftovers()):
            raise InputError(self.path, "holds another run; resume that one, or choose another folder")
        self.remove_leftovers()
        for file in (*below, self.target, self.bad_images, self.metrics, self.config):
            file.unlink(missing_ok=True)
        for folder in (self.extractor, self.tensorboard):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _is_ours(self) -> bool:
        """Whether `config.json` is that of a run, as other programs write files of this name as well."""
        try:
            found = json.loads(self.config.read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and {"preset", "data", "training"} <= found.keys()

    def remove_leftovers(self) -> None:
        """Delete what a kill in the middle of a write left behind, in a folder that holds a run and is this process's.

        Only drafts of the run's own files: another process may be writing other files here, or another run below.
        """
        for path in self._leftovers():
            _discard(path)

    def _leftovers(self) -> Iterator[Path]:
        products = (self.final_samples, self.loss_plot, self.generator, self.best_generator, self.profile)
        files = (self.config, self.target, self.bad_images, self.metrics, *products)
        yield from leftovers(self.path, *(file.name for file in files))
        yield from leftovers(self.checkpoints, "step_*.safetensors", self.best_checkpoint.name)
        yield from leftovers(self.samples, "step_*.png")
        yield from leftovers(self.extractor, "*.safetensors")

    def write_config(self, text: str) -> None:
        """Write `config.json`; from here on the folder holds a run."""
        self._config_text = text
        write_atomically(self.config, text.encode())

    def restore_config(self) -> None:
        """Write `config.json` again if somebody has removed it, or the whole folder, since `write_config`."""
        if self._config_text is not None and not self.config.exists():
            self.write_config(self._config_text)

    def keep_extractors(self, files: Mapping[str, Path]) -> None:
        """Copy the weights of pretrained networks, by architecture, unless they come from here."""
        for name, file in files.items():
            own = self.extractor / f"{name}.safetensors"
            if file != own:
                write_atomically(own, file.read_bytes())

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return self.checkpoints / f"step_{step:08d}.safetensors"

    def checkpoint_paths(self) -> list[Path]:
        """All checkpoints but the best one, oldest first."""
        return sorted(self.checkpoints.glob("step_*.safetensors"))

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint, the best one's included; None before the first.

        InputError if it cannot be read, or if there is a generator and no checkpoint: nothing goes back by itself.
        """
        paths = self.checkpoint_paths()
        best_step = saved_step(self.best_checkpoint) or 0
        if self.best_checkpoint.exists() and best_step > (step_of(paths[-1]) if paths else -1):
            paths.append(self.best_checkpoint)
        if paths:
            return self._load_newest(paths)
        for generator in (self.generator, self.best_generator):
            if generator.exists():
                raise InputError(
                    self.path,
                    f"holds {generator.name} and no checkpoint, so training cannot go on from there; keep it, and "
                    "train in another folder",
                )
        return None

    def _load_newest(self, paths: list[Path]) -> Checkpoint:
        try:
            return Checkpoint.load(paths[-1])
        except InputError as error:
            for older in reversed(paths[:-1]):
                with contextlib.suppress(InputError):
                    step = Checkpoint.load(older).step
                    advice = f"delete it to resume from step {step}, where {older.name} is whole"
                    break
            else:
                advice = "there is no older one, so train in another folder"
            raise InputError(paths[-1], f"{error.message}; {advice}") from None

    def save_checkpoint(self, checkpoint: Checkpoint, keep: int) -> None:
        """Write a checkpoint, then drop all but the newest `keep`."""
        checkpoint.save(self.checkpoint_path(checkpoint.step))
        for path in self.checkpoint_paths()[:-keep]:
            _discard(path)

    def is_complete(self, step: int) -> bool:
        """Whether the generator and the samples of the last step `step` are there."""
        return saved_step(self.generator) == step and self.final_samples.exists()

    def drop_pictures(self) -> None:
        """Drop the samples and the plot of an earlier end, so that `is_complete` waits for those of the new one."""
        for path in (self.final_samples, self.loss_plot):
            if not path.is_symlink():  # which stays, and is written through
                _discard(path)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """See the function `read_metrics`."""
        return read_metrics(self.metrics)

    def rewind(self, step: int) -> None:
        """Drop metrics and sample grids of steps after `step`."""
        kept = [json.dumps(entry) + "\n" for entry in self.read_metrics() if entry["step"] <= step]
        write_atomically(self.metrics, "".join(kept).encode())
        for grid in self.samples.glob("step_*.png"):
            if step_of(grid) > step:
                _discard(grid)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The logged steps, oldest first; lines that cannot be read are left out. InputError for an unreadable file."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(path, f"cannot be read, {error.strerror or error}") from None
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield entry


def _discard(path: Path) -> None:
    """Remove a file that nobody needs; one that cannot be removed is no reason to fail."""
    with contextlib.suppress(OSError):
        path.unlink()


def step_of(path: Path) -> int:
    """The step in a file's name, as in step_00000300.png; −1 if there is none."""
    number = path.stem.partition("_")[2]
    return int(number) if number.isdecimal() else -1


def saved_step(path: Path) -> int | None:
    """The step of a generator's or checkpoint's file; None if the file is missing or damaged."""
    try:
        return int(read_tensors(path)[1]["step"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
