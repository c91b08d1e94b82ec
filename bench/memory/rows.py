"""What bench.memory compares, and the rows of its four tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.rows import Row
from bench.scenario import DTYPE_NAMES, RECOMPUTE_GENERATOR, RECOMPUTE_STAGES, Problem
from engine.training.planner import shown_bytes

GIB = 2**30
BUDGETS = (12, 16, 24, 80)
CAPACITY_PROBLEMS = (Problem("vgg19", 64, "dcgan"), Problem("vgg19", 128, "resnet"))


@dataclass(frozen=True)
class Variant:
    """One way to train: the naive implementation, or the engine.

    Attributes:
        precision: dtype of the arithmetic, None for float32 throughout.
        naive: switches of `NaiveMatching`; None for the engine.
        flags: of the engine's configuration.
        images: real ones that a method knows; None for as many as can matter.
        chunks: of every minibatch that are computed at most; None for all.
    """

    name: str
    precision: torch.dtype | None = None
    naive: Mapping[str, Any] | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    images: int | None = None
    chunks: int | None = None

    @property
    def dtype(self) -> str:
        """The precision, as rows name it."""
        return DTYPE_NAMES[self.precision]


_BF16 = torch.bfloat16
VARIANTS = (
    Variant("naive", naive={}),
    Variant("naive, frozen", naive={"frozen": True}),
    Variant("naive, frozen, autocast", _BF16, naive={"frozen": True, "autocast": _BF16}),
    Variant("ours"),
    Variant("ours --amp", _BF16),
    Variant("ours --amp --recompute stages", _BF16, flags=RECOMPUTE_STAGES),
    Variant("ours --amp --chunk-size 64 --recompute-generator", _BF16, flags={"chunk_size": 64, **RECOMPUTE_GENERATOR}),
)


def _in_chunks(name: str, method: str | None = None, images: int | None = None) -> Variant:
    flags: dict[str, Any] = {"chunk_size": 64, **RECOMPUTE_GENERATOR}
    if method is not None:
        flags |= {"method": method, "pool": "mean"}
    return Variant(name, _BF16, flags=flags, images=images, chunks=3)


METHODS = (
    _in_chunks("gfmn"),
    _in_chunks("mmd, 10,000 real images", "mmd"),
    _in_chunks("mmd, 2,000 landmarks", "mmd", 2000),
    _in_chunks("sinkhorn, 2,000 real images", "sinkhorn"),
    _in_chunks("drifting, 2,000 real images", "drifting"),
    _in_chunks("frechet, 1,797 real images", "frechet", 1797),
    _in_chunks("frechet, any number of real images", "frechet"),
)
"""What `--methods` compares: bf16, chunks of 64 images, the generator recomputed, channel means. The covariance of more
real images than features is one matrix, whatever their number."""


def shown(count: float | None) -> str:
    """Bytes with a unit; nothing for None."""
    return "" if count is None else shown_bytes(count)


@dataclass(frozen=True)
class MemoryRow(Row):
    """One variant at one minibatch.

    Attributes:
        variant, dtype, extractor, generator, image_size, minibatch: what was trained, and how.
        weights: bytes of parameters and buffers, which are not in the other numbers.
        modelled: bytes at the peak of a step beyond the weights, by `engine.training.planner`.
        measured: the same by PyTorch's allocator; None where it was not measured.
        resident: bytes, the largest size of the process that was measured.
        baseline: bytes, its size before the step's parts were made: networks, libraries, compiled kernels.
        chunks: of the minibatch that were computed; the others' features were 0. None for all.
    """

    variant: str
    dtype: str
    extractor: str
    generator: str
    image_size: int
    minibatch: int
    weights: int
    modelled: int
    measured: int | None
    resident: int | None
    baseline: int | None = None
    chunks: int | None = None

    def cells(self) -> dict[str, object]:
        """Bytes with units, and the model's ratio to the measurement."""
        above = None if self.baseline is None or self.resident is None else self.resident - self.baseline
        return {
            "variant": self.variant,
            "minibatch": self.minibatch,
            "modelled": shown(self.modelled),
            "measured": shown(self.measured),
            "modelled / measured": "" if self.measured is None else f"{self.modelled / self.measured:.3f}",
            "resident (whole process)": shown(self.resident),
            "above its baseline": shown(above),
        }


@dataclass(frozen=True)
class ScaleRow(Row):
    """What one more image costs a variant.

    Attributes:
        modelled, measured: bytes an image, between the two largest minibatches that were modelled or measured.
    """

    variant: str
    dtype: str
    extractor: str
    generator: str
    image_size: int
    modelled: float
    measured: float | None

    def cells(self) -> dict[str, object]:
        """The slopes, in KiB an image."""
        return {
            "variant": self.variant,
            "KiB for one more image, modelled": f"{self.modelled / 1024:.0f}",
            "measured": "" if self.measured is None else f"{self.measured / 1024:.0f}",
        }


@dataclass(frozen=True)
class SavedRow(Row):
    """What is kept of an extractor between forward and backward.

    Attributes:
        saved: bytes an image.
        floor: bytes an image of the taps alone, D · size of a number, which backward needs for its masks.
    """

    extractor: str
    image_size: int
    dtype: str
    saved: int
    floor: int

    def cells(self) -> dict[str, object]:
        """KiB an image, and the ratio to the taps alone."""
        return {
            "saved for backward": f"{self.extractor} at {self.image_size}",
            "dtype": self.dtype,
            "KiB an image": f"{self.saved / 1024:.0f}",
            "/ its taps": f"{self.saved / self.floor:.3f}",
        }


@dataclass(frozen=True)
class CapacityRow(Row):
    """The largest minibatch (modelled) whose step fits `budget` bytes, weights included; 0 if none does."""

    variant: str
    dtype: str
    extractor: str
    generator: str
    image_size: int
    budget: int
    minibatch: int
