"""Errors of images against SciPy's filters, and against autograd through an extractor's plain features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import in_float64, relative_error
from scipy import ndimage
from torch import Tensor

from engine.comparison.image_losses import PerceptualErrors, laplacian_pyramid, pixel_errors, pyramid_errors
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.support.errors import InputError

FILTER = np.array([1, 4, 6, 4, 1]) / 16


def blurred(image: np.ndarray, gain: float = 1) -> np.ndarray:
    for axis in (0, 1):
        image = ndimage.convolve1d(image, gain * FILTER, axis=axis, mode="mirror")
    return image


def written_out(image: np.ndarray, levels: int) -> list[np.ndarray]:
    """The pyramid of one channel [H, W]."""
    found = []
    for _ in range(levels):
        smaller = blurred(image)[::2, ::2]
        sparse = np.zeros_like(image)
        sparse[::2, ::2] = smaller
        found.append(image - blurred(sparse, gain=2))
        image = smaller
    return [*found, image]


def pair(side: tuple[int, int] = (32, 32), count: int = 3) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    drawn, real = torch.rand(2, count, 3, *side, generator=random, dtype=torch.float64) * 2 - 1
    return drawn.requires_grad_(), real


@pytest.mark.parametrize(("side", "levels"), [((32, 32), 3), ((17, 13), 2), ((8, 5), 1), ((64, 64), 4), ((33, 40), 5)])
def test_the_pyramid_is_scipys(side: tuple[int, int], levels: int) -> None:
    _, images = pair(side)
    found = laplacian_pyramid(images, levels)
    assert len(found) == levels + 1
    for number, image in enumerate(images.numpy()):
        for channel, plane in enumerate(image):
            for level, expected in zip(found, written_out(plane, levels), strict=True):
                np.testing.assert_allclose(level[number, channel].numpy(), expected, rtol=0, atol=1e-14)


def test_errors_of_the_pyramid() -> None:
    drawn, real = pair()
    found = pyramid_errors(drawn, real)
    assert len(laplacian_pyramid(real)) == 4
    for one, other, error in zip(drawn.detach().numpy(), real.numpy(), found.tolist(), strict=True):
        levels = zip(*(written_out(plane, 3) for plane in one - other), strict=True)
        assert error == pytest.approx(sum(np.abs(np.stack(level)).mean() for level in levels), rel=1e-12)
    few, others = pair((8, 5), 2)
    assert torch.autograd.gradcheck(lambda x: pyramid_errors(x, others), few)


def test_errors_of_pixels() -> None:
    drawn, real = pair()
    found, upstream = pixel_errors(drawn, real), torch.randn(3, dtype=torch.float64)
    assert found.tolist() == pytest.approx([((x - y) ** 2).sum().item() for x, y in zip(drawn, real, strict=True)])
    found.backward(upstream)
    expected = 2 * (drawn - real) * upstream.view(-1, 1, 1, 1)
    torch.testing.assert_close(drawn.grad, expected.detach(), rtol=1e-12, atol=0)


def extractor(name: str = "vgg-small") -> Extractor:
    torch.manual_seed(0)
    return in_float64(build_extractor(name, image_size=32, layers=4))


@pytest.mark.parametrize("recompute", ["none", "stages"])
@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("name", ["vgg-small", "vgg-small+resnet18"])
def test_errors_of_features(name: str, chunk_size: int | None, recompute: str) -> None:
    network, (drawn, real) = extractor(name), pair()
    errors = PerceptualErrors(FeaturePass(network, chunk_size=chunk_size, recompute=recompute))
    found, upstream = errors(drawn, real), torch.randn(3, dtype=torch.float64)
    found.backward(upstream)
    again = drawn.detach().requires_grad_()
    difference = (network.features(again) - network.features(real)).abs()
    sizes = [tap.num_features for tap in network.taps]
    expected = sum(part.mean(dim=1) for part in difference.split(sizes, dim=1))
    expected = expected + (again - real).abs().mean(dim=(1, 2, 3))
    expected.backward(upstream)
    assert relative_error(found, expected) < 1e-12
    assert relative_error(drawn.grad, again.grad) < 1e-9
    with torch.no_grad():
        assert torch.equal(errors(drawn, real), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_low_precision_keep_their_gradients(dtype: torch.dtype) -> None:
    network, (drawn, real) = extractor(), pair()
    gradients = []
    for low in (None, dtype):
        leaf = drawn.detach().float().requires_grad_()
        PerceptualErrors(FeaturePass(network.float(), dtype=low))(leaf, real.float()).sum().backward()
        of_pixels = (leaf.detach() - real.float()).sign() / leaf[0].numel()
        gradients.append(leaf.grad - of_pixels)
    assert relative_error(gradients[1], gradients[0]) < (0.3 if dtype is torch.bfloat16 else 0.05)


@pytest.mark.parametrize("levels", [0, 5, -1])
def test_bad_levels(levels: int) -> None:
    with pytest.raises(InputError, match="fewer than log"):
        laplacian_pyramid(torch.rand(1, 3, 32, 32), levels)
