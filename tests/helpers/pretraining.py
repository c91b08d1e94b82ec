"""Helpers: pretraining that takes a few steps on pictures of noise, and is interrupted where a test says."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.representation.pretraining import PretrainResult, pretrain, training
from engine.representation.pretraining.recipe import one_cycle
from pipelines import ImageDataset


def make_array(path: Path, count: int = 44, size: int = 16, labels: bool = True) -> Path:
    """Pictures of noise whose brightness tells their class, in a .npz file."""
    random = np.random.default_rng(0)
    classes = np.arange(count) % 2
    pictures = random.integers(0, 120, (count, size, size, 3), dtype=np.uint8) + (100 * classes[:, None, None, None])
    arrays = {"images": pictures.astype(np.uint8)}
    np.savez(path, **(arrays | {"labels": classes} if labels else arrays))
    return path


def short(dataset: ImageDataset, **options: Any) -> PretrainResult:
    options = {"steps": 7, "batch_size": 16, "progress": False} | options
    return pretrain(options.pop("architecture", "vgg-small"), dataset, **options)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A real Ctrl-C in the middle of training step `step`, when it asks for its learning rate."""

    def interrupted(taken: int, total: int) -> float:
        if taken == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return one_cycle(taken, total)

    monkeypatch.setattr(training, "one_cycle", interrupted)
