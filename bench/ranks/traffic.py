"""What a process hands to torch.distributed, and from where in the engine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import engine

_ENGINE = Path(engine.__file__).parent
# What carries out everybody else's exchanges.
_CARRIERS = ("training/ranks.py", "training/arriving.py")
# Who calls for a collective: the innermost of these in the stack.
_PARTS = {
    "generation/batch_norm": "BatchNorm",
    "comparison/moment_matching": "moments",
    "comparison/on_features": "features",
    "methods": "gradients",
}
_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "scatter",
    "send",
)


@dataclass(frozen=True)
class Exchange:
    """One collective.

    Attributes:
        what: "moments", "features", "counts", "gradients", "BatchNorm", or "other".
        size: bytes of its result on this rank.
    """

    what: str
    size: int


@contextlib.contextmanager
def watched() -> Iterator[list[Exchange]]:
    """Inside, every collective of this process is written down, and carried out."""
    found: list[Exchange] = []
    own = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}

    def watching(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(result: Any, *args: Any, **options: Any) -> Any:
            tensors = [result] if isinstance(result, Tensor) else list(result)
            counts = all(not tensor.is_floating_point() for tensor in tensors)
            found.append(Exchange("counts" if counts else _caller(), sum(tensor.nbytes for tensor in tensors)))
            return collective(result, *args, **options)

        return call

    try:
        for name, collective in own.items():
            setattr(dist, name, watching(collective))
        yield found
    finally:
        for name, collective in own.items():
            setattr(dist, name, collective)


def _caller() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ENGINE):
            name = path.relative_to(_ENGINE).as_posix()
            if name not in _CARRIERS:
                return next((part for start, part in _PARTS.items() if name.startswith(start)), "other")
        frame = frame.f_back
    return "other"


def expected(features: int, generator: nn.Module, ranks: int) -> dict[str, int]:
    """What moment matching should hand over in a step, in float32: bytes, by kind.

    Moments: 4·2·D·W. Counts: 8·W. Gradients: 4·P. A BatchNorm of C channels: 8·(C + 1) for the sum and the number of
    values, 4·C for their squares, 4·2·C in backward.
    """
    channels = [norm.num_features for norm in generator.modules() if isinstance(norm, nn.BatchNorm2d)]
    return {
        "moments": 4 * 2 * features * ranks,
        "counts": torch.int64.itemsize * ranks,
        "gradients": 4 * sum(weight.numel() for weight in generator.parameters()),
        "BatchNorm": sum(8 * (count + 1) + 4 * count + 4 * 2 * count for count in channels),
    }
