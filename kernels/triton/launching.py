"""How work is divided among programs, and how kernels are launched."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Elements of a tile in every dtype of activations: more per thread would be too many registers for two accumulators,
# fewer too few bytes in flight per multiprocessor.
TILE_ELEMENTS = 4096
# The same with float64 sums, whose accumulators take twice the registers.
WIDE_TILE_ELEMENTS = 2048
NUM_WARPS = 8
# Widest first: whole pages of DRAM while that still gives every multiprocessor two programs; 64 features of bfloat16
# are one 128-byte line, the narrowest that wastes nothing.
BLOCKS_F = (256, 128, 64)
# A split of fewer rows would spend more time on its partial sums than on its rows.
MIN_ROWS_PER_SPLIT = 16
# What a device has where none can be asked (the interpreter): an H100's multiprocessors.
NOMINAL_PROCESSORS = 132

# Whether Triton, its own library included, was imported with TRITON_INTERPRET=1.
INTERPRETED = triton.knobs.runtime.interpret and not isinstance(tl.sum, triton.JITFunction)
# Sizes that no kernel is compiled for.
RUNTIME_SIZES = [
    "rows", "channels", "inner", "count", "rows_per_split", "splits", "dof", "programs", "columns", "offset",
    "diagonal", "columns_per_split",
]  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """How programs share the rows [N, F] of a tap.

    Attributes:
        block_n, block_f: rows and features of one tile.
        splits: programs that share a block of features, each with `rows_per_split` rows (the last may have fewer).
    """

    block_n: int
    block_f: int
    splits: int
    rows_per_split: int


@functools.lru_cache(maxsize=1024)
def tiling(rows: int, features: int, processors: int, wide: bool = False) -> Tiling:
    """The widest block that gives every multiprocessor two programs, else the narrowest, split over the rows.

    `wide` is for sums in float64.

    Splits only begin where even narrow blocks leave half of the multiprocessors idle (fewer than 64 · processors / 2
    features): partial sums cost 16 bytes per feature and split.
    """
    block_f = next((block for block in BLOCKS_F if features >= 2 * processors * block), BLOCKS_F[-1])
    blocks = triton.cdiv(features, block_f)
    wanted = max(1, min(processors // blocks, rows // MIN_ROWS_PER_SPLIT))
    rows_per_split = triton.cdiv(rows, wanted)
    elements = WIDE_TILE_ELEMENTS if wide else TILE_ELEMENTS
    return Tiling(elements // block_f, block_f, triton.cdiv(rows, rows_per_split), rows_per_split)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return NOMINAL_PROCESSORS


def launch(kernel, device: torch.device, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Every kernel goes through here (the audit listens): `kernel[grid](*arguments, **constants)` on `device`."""
    other_device = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    with torch.cuda.device(device) if other_device else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)
