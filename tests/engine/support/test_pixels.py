"""Images in [-1, 1] and as bytes: every byte survives the way there and back, in the engine and in the pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.support import pixels
from pipelines import pixels as pipeline_pixels

BYTES = torch.arange(256, dtype=torch.uint8)


def test_every_byte_has_its_value_and_comes_back() -> None:
    images = BYTES[:243].reshape(3, 9, 3, 3).permute(0, 3, 1, 2)  # [3, 3, 9, 3]
    values = pixels.to_float(images)
    expected = (images.double().numpy() - 127.5) / 127.5
    np.testing.assert_array_equal(values.numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(pixels.to_uint8(values), images.permute(0, 2, 3, 1))
    assert pixels.to_float(BYTES[[0, 255]]).tolist() == [-1, 1]


def test_the_memory_format_and_the_argument_stay() -> None:
    images = BYTES[:192].reshape(2, 3, 8, 4).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    assert pixels.to_float(images).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    values = before.float()
    pixels.to_float(values)
    assert torch.equal(values, before.float())


@pytest.mark.parametrize(("value", "byte"), [(-1.5, 0), (-1, 0), (0, 128), (0.999, 255), (1, 255), (7, 255)])
def test_values_outside_are_clipped(value: float, byte: int) -> None:
    images = torch.full((1, 3, 2, 2), float(value))
    assert (pixels.to_uint8(images) == byte).all()
    assert (pipeline_pixels.to_uint8(images) == byte).all()


def test_every_byte_survives_the_pipelines() -> None:
    values = pipeline_pixels.to_float_(BYTES.float())
    np.testing.assert_allclose(values, pixels.to_float(BYTES), rtol=0, atol=2**-24)
    assert values[[0, 255]].tolist() == [-1, 1]
    assert torch.equal(pipeline_pixels.to_uint8(values), BYTES)
