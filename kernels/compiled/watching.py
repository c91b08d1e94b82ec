"""The watch over the loss, in plain PyTorch: a scalar is not worth compiling."""

from __future__ import annotations

from kernels import plain
from kernels.operators import operator

watch = operator("compiled")(plain.watch)
