"""`dataset_moments` of every backend: float64 sums over batches, against all images at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, LAYOUTS, MODULES, TOLERANCE, Activations, backend, device_of, dtype_id, shape_cases
from helpers.marks import slow
from oracle import relative_error
from torch import Tensor

from kernels.compiled import moments as compiled_moments

DTYPES = tuple(TOLERANCE)

COUNT = 53
BATCHES = ((0, 37), (37, 53))


@dataclass
class Dataset:
    """Images of a whole dataset as they arrive at one tap, in batches.

    Attributes:
        shape: (N, C, H, W).
        sizes: of the batches.
    """

    shape: tuple[int, int, int, int]
    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    bias: bool = True
    residual: bool = True
    activation: str = "relu"

    def run(self, name: str, images: int | None = None) -> None:
        """`dataset_moments` of every batch in turn; checks features against float64, then moments against the features.

        `images` is how many are told to be expected, by default as many as come.

        All that a low dtype may cost is the rounding of every feature: moments are as exact as float64 is.
        """
        kernels, device = backend(name), device_of(name)
        _, channels, height, width = self.shape
        memory_format = LAYOUTS[self.layout]
        x, beside = (
            (3 * torch.randn(self.shape) + 2).to(self.dtype).contiguous(memory_format=memory_format) for _ in range(2)
        )
        bias = torch.randn(channels).to(self.dtype)
        expected = x.double() + self.bias * bias.double().view(-1, 1, 1) + self.residual * beside.double()
        expected = {"relu": F.relu, "relu6": F.relu6, "none": lambda y: y}[self.activation](expected)

        mean, m2 = (
            torch.full((channels * height * width,), float("nan"), dtype=torch.float64, device=device) for _ in range(2)
        )
        features, count = [], 0
        for part, shortcut in zip(x.split(self.sizes), beside.split(self.sizes), strict=True):
            y, shortcut = (value.to(device).clone(memory_format=torch.preserve_format) for value in (part, shortcut))
            own_bias = bias.to(device) if self.bias else None
            kernels.dataset_moments(
                y, mean, m2, count, own_bias, shortcut if self.residual else None, self.activation, images or len(x)
            )
            features.append(y.cpu())
            count += len(y)
        stored = torch.cat(features).double()
        assert relative_error(stored, expected) <= 2 * TOLERANCE[self.dtype][0], "bias and shortcut may round apiece"
        rows = stored.permute(0, 2, 3, 1) if self.layout == "channels_last" else stored
        variance, expected_mean = torch.var_mean(rows.flatten(1), dim=0, correction=0)
        # Inductor sums what it has computed in float32, before that is rounded to be stored.
        unrounded = name == "compiled" and self.dtype.itemsize == 2 and (self.bias or self.residual)
        tolerances = TOLERANCE[self.dtype] if unrounded else (1e-14, 1e-13)
        assert relative_error(mean.cpu(), expected_mean) <= tolerances[0]
        assert relative_error(m2.cpu(), variance * len(x)) <= tolerances[1]


SHAPES = {
    "one value": ((1, 1, 1, 1), (1,)),
    "one image at a time": ((3, 5, 3, 3), (1, 1, 1)),
    "prime": ((41, 67, 1, 1), (37, 4)),
    "odd": ((16, 3, 5, 7), (5, 5, 5, 1)),
    "aligned": ((40, 16, 4, 4), (16, 16, 8)),
    "tail of a block": ((9, 65, 1, 1), (7, 2)),
    "split over images": ((131, 6, 2, 2), (67, 64)),
    "more images than a tile": ((259, 3, 2, 1), (257, 2)),
    "several tiles of a program": ((74, 131, 8, 8), (37, 37)),
}


@pytest.mark.parametrize(("shape", "dtype", "name"), shape_cases(SHAPES, MODULES, "several tiles of a program"))
def test_shapes(shape: str, dtype: torch.dtype, name: str) -> None:
    for layout in LAYOUTS:
        Dataset(*SHAPES[shape], dtype, layout).run(name)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "shortcut"])
def test_what_a_tap_adds_and_applies(residual: bool, bias: bool, activation: str, name: str) -> None:
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            Dataset((35, 6, 3, 2), (16, 19), dtype, layout, bias, residual, activation).run(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", ["triton"])
def test_features_are_those_of_training(dtype: torch.dtype, name: str) -> None:
    """Bit for bit what `relu_moments` leaves, whose sums are in float32: the target is of the features that train."""
    case = Activations((37, 6, 3, 2), dtype, bias=True, residual=True, device=device_of(name))
    own = {key: value.to(case.device) for key, value in case.inputs.items()}
    wide = torch.empty(36, dtype=torch.float64, device=case.device)
    x = own["x"].clone(memory_format=torch.preserve_format)
    backend(name).relu_moments(own["x"], own["mean"], own["m2"], 0, own["bias"], own["residual"])
    backend(name).dataset_moments(x, wide, wide.clone(), 0, own["bias"], own["residual"])
    assert torch.equal(x, own["x"])


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


@pytest.mark.parametrize(
    ("dtype", "bias", "residual", "activation"),
    [
        (torch.float32, True, False, "relu"),
        (torch.float32, True, True, "relu6"),
        slow(torch.float32, False, False, "relu6"),
        slow(torch.bfloat16, True, False, "relu"),
        slow(torch.bfloat16, False, False, "none"),
    ],
)
def test_streams_of_what_a_tap_adds_and_applies(
    dtype: torch.dtype, bias: bool, residual: bool, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_moments, "STREAMED_FEATURES", 1)
    case = Dataset((53, 6, 4, 4), (37, 16), dtype, "channels_last", bias, residual, activation)
    case.run("compiled", compiled_moments.STREAMED_IMAGES)


@pytest.mark.parametrize("name", MODULES)
def test_low_precision_activations(name: str) -> None:
    check(name, images(torch.bfloat16), None, "relu", COUNT)
