"""`dataset_moments` of every backend: float64 sums over batches, against NumPy on all images at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import MODULES, backend, device_of
from torch import Tensor

from kernels.compiled import moments as compiled_moments

COUNT = 53
BATCHES = ((0, 37), (37, 53))


def images(dtype: torch.dtype) -> Tensor:
    """Means a thousand times the deviation, and a feature that is on in one image only."""
    x = torch.randn(COUNT, 6, 4, 4) * 0.05 + 50
    x[:, 0] = -1
    x[3, 0] = 7
    return x.to(dtype)


def check(name: str, x: Tensor, shortcut: Tensor | None, activation: str, expected_images: int) -> None:
    kernels, device = backend(name), device_of(name)
    expected = (x if shortcut is None else x + shortcut).relu()
    rows = expected.permute(0, 2, 3, 1).flatten(1).double().numpy()
    mean, m2 = (torch.full((96,), float("nan"), dtype=torch.float64, device=device) for _ in range(2))
    out = []
    for start, end in BATCHES:
        y = x[start:end].contiguous(memory_format=torch.channels_last).clone().to(device)
        beside = None
        if shortcut is not None:
            beside = shortcut[start:end].contiguous(memory_format=torch.channels_last).to(device)
        kernels.dataset_moments(y, mean, m2, start, None, beside, activation, expected_images)
        out.append(y.cpu())
    assert torch.equal(torch.cat(out), expected)
    np.testing.assert_allclose(mean.cpu().numpy(), rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(m2.cpu().numpy(), ((rows - rows.mean(axis=0)) ** 2).sum(axis=0), rtol=1e-9)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("with_shortcut", [False, True], ids=["plain", "shortcut"])
def test_two_batches(with_shortcut: bool, name: str) -> None:
    shortcut = torch.rand(COUNT, 6, 4, 4) if with_shortcut else None
    check(name, images(torch.float32), shortcut, "relu", COUNT)


@pytest.mark.parametrize("with_shortcut", [False, True], ids=["plain", "shortcut"])
def test_the_streaming_kernel(with_shortcut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only large taps of large datasets are worth it; here a small one is streamed, sixteen images at a time."""
    monkeypatch.setattr(compiled_moments, "STREAMED_FEATURES", 1)
    calls = []
    kernel = compiled_moments._streaming_kernel()
    monkeypatch.setattr(compiled_moments, "_streaming_kernel", lambda: lambda *args: (calls.append(1), kernel(*args)))
    shortcut = torch.rand(COUNT, 6, 4, 4) if with_shortcut else None
    check("compiled", images(torch.float32), shortcut, "relu", compiled_moments.STREAMED_IMAGES)
    assert len(calls) == 1, "the first batch has no running mean yet; the second is one group of sixteen"


@pytest.mark.parametrize("name", MODULES)
def test_low_precision_activations(name: str) -> None:
    check(name, images(torch.bfloat16), None, "relu", COUNT)
