"""Where things run."""

from __future__ import annotations

import torch

from engine.support.errors import InputError


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """The device of `--device auto|cpu|cuda`, with `--threads` on the CPU; InputError if it is not there."""
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads: must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: cuda is not available here (no GPU, or no driver); use --device cpu")
    return torch.device(name)
