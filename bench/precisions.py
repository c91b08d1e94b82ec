"""The precisions that steps are compared in: each with the products of its float32 convolutions, and its tolerance."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench.scenario import DTYPE_NAMES
from engine.configuration.inputs import choose_device

# Relative error of ∂L/∂images against float64: masks and pooling ties flip, and their share grows with the root of a
# rounding. TF32 has 11 bits, as float16; bfloat16 has 8.
_TOLERANCES = {
    "cpu": {"float32": 5e-3, "fp16": 0.05, "bf16": 0.2},
    "cuda": {"float32": 5e-3, "tf32": 0.1, "fp16": 0.1, "bf16": 0.25},
}


@dataclass(frozen=True)
class Precision:
    """How a step computes on a device.

    Attributes:
        name: among the rows: "float32" (IEEE), "tf32", "bf16" or "fp16".
        dtype: of autocast; None for float32 throughout.
        device: "cpu" or "cuda".
    """

    name: str
    dtype: torch.dtype | None
    device: str

    @property
    def tolerance(self) -> float:
        """Relative error of ∂L/∂images against float64 above which nothing is timed."""
        return _TOLERANCES[self.device][self.name]

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, the device's float32 convolutions are as the engine sets them for this precision."""
        before = torch.backends.cudnn.allow_tf32
        choose_device(self.device, float32="ieee" if self.name == "float32" else "tf32")
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def applied(self, call: Callable[[], object]) -> Callable[[], None]:
        """`call` with this precision in force, whatever ran before."""

        def run() -> None:
            with self.in_force():
                call()

        return run


def full_precisions(device: str) -> list[Precision]:
    """Of float32: IEEE, and on CUDA also TF32, which is the engine's default there."""
    names = ("float32", "tf32") if device == "cuda" else ("float32",)
    return [Precision(name, None, device) for name in names]


def low_precision(device: str, dtype: torch.dtype) -> Precision:
    """Of autocast."""
    return Precision(DTYPE_NAMES[dtype], dtype, device)
