"""The watch over the loss, in plain PyTorch."""

from __future__ import annotations

from kernels import plain
from kernels.operators import operator

watch = operator("reference")(plain.watch)
