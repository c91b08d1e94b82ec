"""The folder of a run: what lies where, and how it survives a kill at any moment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.support.errors import InputError
from engine.support.files import write_atomically
from engine.training.checkpoint import Checkpoint

COLUMNS = 8
"""Images in a row of the sample grids."""


class RunFolder:
    """`config.json`, `metrics.jsonl`, `samples/`, `samples.png`, `loss.png`, `checkpoints/`, `generator.safetensors`,
    `tensorboard/`; with evaluation during training, `generator_best.safetensors` and `checkpoints/best.safetensors`.

    Everything but the metrics is written atomically. Metrics are appended; on resume, lines after the checkpoint's
    step, and a line that a kill cut short, are dropped.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
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

    def check_new(self) -> None:
        """InputError if the folder already holds something."""
        if self.config.exists():
            raise InputError(self.path, "holds another run; resume that one, or choose another folder")
        self.remove_leftovers()
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(self.path, "is not an empty folder; choose another one")

    def remove_leftovers(self) -> None:
        """Delete what a kill in the middle of a write left behind."""
        for path in self.path.rglob(".*.tmp"):
            path.unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        """Write `config.json`; from here on the folder holds a run."""
        self._config_text = text
        write_atomically(self.config, text.encode())

    def restore_config(self) -> None:
        """Write `config.json` again if somebody has removed it, or the whole folder, since `write_config`."""
        if self._config_text is not None and not self.config.exists():
            self.write_config(self._config_text)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return self.checkpoints / f"step_{step:08d}.safetensors"

    def checkpoint_paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step_*.safetensors"))

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint, or None before the first; InputError if it cannot be read."""
        paths = self.checkpoint_paths()
        return Checkpoint.load(paths[-1]) if paths else None

    def save_checkpoint(self, checkpoint: Checkpoint, keep: int) -> None:
        """Write a checkpoint, then drop all but the newest `keep`."""
        checkpoint.save(self.checkpoint_path(checkpoint.step))
        for path in self.checkpoint_paths()[:-keep]:
            path.unlink(missing_ok=True)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The logged steps, oldest first; an incomplete last line is left out."""
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return

    def truncate_metrics(self, step: int) -> None:
        """Drop metrics of steps after `step`."""
        kept = [json.dumps(entry) + "\n" for entry in self.read_metrics() if entry["step"] <= step]
        write_atomically(self.metrics, "".join(kept).encode())
