"""How a network is pretrained: the settings of one run, checked where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.support.errors import InputError

_LARGEST_RATE = 1e30  # float32 holds it, with some room
DEFAULT_EPOCHS = 6
DEFAULT_STEPS = (150, 2000)
"""Least and most training steps of a run that names neither epochs nor steps."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one pretraining run.

    Attributes:
        task: "classify" and "tinted", for grey images (both need labels), "rotate" or "autoencode".
        epochs, steps: how long, one of the two. Neither: six epochs, but at least 150 and at most 2,000 steps.
        batch_size: images in a batch, at least 2.
        lr: peak learning rate. None is the task's: 0.1 for SGD; 1e-3 for "autoencode", which uses Adam.
        momentum: of SGD. None is the task's: 0.9; "autoencode" has none, and takes no other.
        weight_decay: None is the task's: 5e-4 for SGD; 0 for "autoencode".
        crop_padding: pixels of black added on each side before a window of the old size is cut out; 0 is no crop.
        flip: also show images mirrored; wrong for digits and letters.
        seed: of initial weights, order and augmentation. The held-out images do not depend on it.
        amp: train under bfloat16 autocast.

    Raises InputError for the first setting that is out of range, or if epochs and steps are both given.
    """

    task: str = "classify"
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 64
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    crop_padding: int = 4
    flip: bool = False
    seed: int = 0
    amp: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "steps"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise InputError(name, f"must be at least 1, got {count}")
        if self.epochs is not None and self.steps is not None:
            raise InputError("steps", "give epochs or steps, not both")
        if self.batch_size < 2:
            raise InputError("batch_size", f"BatchNorm needs at least 2 images, got {self.batch_size}")
        if self.lr is not None and not 0 < self.lr <= _LARGEST_RATE:
            raise InputError("lr", f"must be a positive number, at most {_LARGEST_RATE:g}, got {self.lr}")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise InputError("momentum", f"must be at least 0 and below 1, got {self.momentum}")
        if self.weight_decay is not None and not 0 <= self.weight_decay <= _LARGEST_RATE:
            raise InputError("weight_decay", f"must be from 0 to {_LARGEST_RATE:g}, got {self.weight_decay}")
        if self.crop_padding < 0:
            raise InputError("crop_padding", f"must not be negative, got {self.crop_padding}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Training steps of the run, for a data set of so many batches."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return self.epochs * steps_per_epoch
        least, most = DEFAULT_STEPS
        return min(max(DEFAULT_EPOCHS * steps_per_epoch, least), most)


def one_cycle(step: int, total: int) -> float:
    """Share of the peak learning rate at `step` of `total`: up in the first fifth, then down a half cosine to 0."""
    rise = max(total // 5, 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))
