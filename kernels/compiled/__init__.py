"""The operations through torch.compile: fused, vectorised, threaded loops on a CPU.

The same maths as `reference`, arranged for Inductor:

- Sums around a pilot value (the running mean, or the first image before there is one) give mean and centred second
  moment in one pass, without the cancellation of raw sums. Which of the two is chosen by a scalar, so that merging
  into earlier moments and starting afresh are one kernel.
- Sizes are dynamic, so neither another minibatch nor another tap compiles anything again. What still would is kept
  away from the kernels: a single image (size 1 is special to PyTorch) is doubled, and more than `MAX_ROWS` images
  (where Inductor changes its way to sum) are merged slice by slice.
- Small work has a kernel of its own without threads. Waking them costs more than they bring, and milliseconds where
  other processes want the cores; and left to itself Inductor would decide by the size that happens to come first.

In float16 and bfloat16, where a bias or a shortcut is added, sums are of y before it is rounded to be stored: Inductor
drops a conversion there and back.

One kernel per dtype, activation and presence of bias and shortcut; Inductor's own cache keeps them between runs.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys

import torch

from kernels._dynamo import GRAIN, dynamo
from kernels.compiled.averaging import averager_step
from kernels.compiled.moments import dataset_moments, relu_moments, relu_moments_backward
from kernels.compiled.pairwise import nearest, pairwise_sums
from kernels.compiled.watching import watch
from kernels.layout import accumulation_dtype

__all__ = [
    "averager_step",
    "dataset_moments",
    "nearest",
    "pairwise_sums",
    "relu_moments",
    "relu_moments_backward",
    "watch",
    "works",
]


def works(dtype: torch.dtype) -> str | None:
    """None if torch.compile can build code here that computes the right numbers, else the reason in one line.

    The trial is the forward operation itself, so that what it compiles is not wasted.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on the PATH"
    try:
        inductor = importlib.import_module("torch._inductor.exc")
        failures = (inductor.InductorError, inductor.InvalidCxxCompiler, dynamo().exc.TorchDynamoException)
    except OSError as error:  # their modules make Inductor's cache folder
        return f"Inductor's cache folder cannot be used ({error})"
    features = GRAIN // 16
    x = (torch.arange(16 * features) * 7 % 61 - 30).reshape(16, features, 1, 1).to(dtype) / 8
    variance, expected = torch.var_mean(x.double().relu().flatten(1), dim=0, correction=0)
    mean = torch.zeros(features, dtype=accumulation_dtype(dtype))
    m2 = mean.clone()
    try:
        relu_moments(x, mean, m2, 0)
    except (*failures, OSError) as error:
        return f"{compiler} cannot build Inductor's code ({str(error).strip().splitlines()[0]})"
    if not (torch.allclose(mean.double(), expected, 1e-4) and torch.allclose(m2.double() / 16, variance, 1e-3)):
        return "Inductor's code computes wrong numbers"  # such as code for another CPU, from a cache
    return None
