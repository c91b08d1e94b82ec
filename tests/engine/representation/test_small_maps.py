"""Convolutions of small maps by products, against float64 and against oneDNN's own."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from helpers.criteria import Weighted
from oracle import relative_error
from torch import Tensor, nn

from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.tracing import small_maps
from engine.representation.tracing.convolutions import FusedConv2d, can_fuse
from engine.training.planner import StorageTracker

# Size of the map, and the convolution.
GEOMETRIES = [
    pytest.param((1, 1), {"kernel_size": 3, "padding": 1}, id="3x3 of 1x1"),
    pytest.param((2, 2), {"kernel_size": 3, "padding": 1}, id="3x3 of 2x2"),
    pytest.param((2, 2), {"kernel_size": 3, "padding": 1, "bias": False}, id="no bias"),
    pytest.param((2, 2), {"kernel_size": 3, "padding": 1, "stride": 2}, id="3x3 of 2x2, stride 2"),
    pytest.param((3, 3), {"kernel_size": 3, "padding": 1, "stride": 2}, id="3x3 of 3x3, stride 2"),
    pytest.param((4, 4), {"kernel_size": 3, "padding": 1, "stride": 2}, id="3x3 of 4x4, stride 2"),
    pytest.param((4, 3), {"kernel_size": 3}, id="3x3 of 4x3, no padding"),
    pytest.param((2, 2), {"kernel_size": 5, "padding": 2}, id="5x5 of 2x2"),
    pytest.param((1, 4), {"kernel_size": (5, 3), "padding": (2, 1)}, id="5x3 of 1x4"),
    pytest.param((2, 1), {"kernel_size": 2, "padding": 1, "stride": (2, 1)}, id="2x2 of 2x1"),
    pytest.param((1, 1), {"kernel_size": 1}, id="1x1 of 1x1"),
    pytest.param((4, 4), {"kernel_size": 1}, id="1x1 of 4x4"),
    pytest.param((3, 4), {"kernel_size": 1, "stride": 2}, id="1x1 of 3x4, stride 2"),
    pytest.param((4, 4), {"kernel_size": 2, "stride": 3, "padding": 1}, id="a stride beyond the kernel"),
]
DTYPES = [pytest.param(torch.float32, 2e-6, id="float32"), pytest.param(torch.bfloat16, 4e-3, id="bf16")]
WANTED = {"none": lambda y: y, "relu": torch.relu, "relu6": nn.functional.relu6}


@pytest.fixture
def any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few channels and few images are enough."""
    monkeypatch.setattr(small_maps, "LEAST_WORK", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function of the module runs."""
    counts: Counter[str] = Counter()
    for name in ("convolve", "input_gradient"):
        own = getattr(small_maps, name)

        def counted(*args, name=name, own=own):
            counts[name] += 1
            return own(*args)

        monkeypatch.setattr(small_maps, name, counted)
    return counts


def convolution(channels: int, filters: int, dtype: torch.dtype, **geometry) -> nn.Conv2d:
    conv = nn.Conv2d(channels, filters, **geometry).requires_grad_(False)
    return conv.to(dtype, memory_format=torch.channels_last)


def frozen(conv: nn.Conv2d, activation: str = "none") -> FusedConv2d:
    if not can_fuse(conv.weight):
        pytest.skip("oneDNN has no such convolution here")
    return FusedConv2d(conv, activation)


def draw_map(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)


def exact(conv: nn.Conv2d, x: Tensor, activation: str = "none") -> tuple[Tensor, Tensor, Tensor]:
    """Result, a gradient for it, and the input gradient of the convolution alone, in float64."""
    x = x.double().requires_grad_()
    y = copy.deepcopy(conv).double()(x)
    grad = draw_map(*y.shape, dtype=conv.weight.dtype)
    (gradient,) = torch.autograd.grad(y, x, grad.double())
    return WANTED[activation](y.detach()), grad, gradient


@pytest.mark.usefixtures("any_work")
@pytest.mark.parametrize("activation", WANTED)
@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize(("size", "geometry"), GEOMETRIES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_against_float64(dtype, tolerance, size, geometry, count, activation, calls):
    conv = convolution(13, 7, dtype, **geometry)
    x = draw_map(count, 13, *size, dtype=dtype)
    wanted, grad, wanted_gradient = exact(conv, x, activation)
    module = frozen(conv, activation)
    y, gradient = module.run(x), module.input_gradient(grad, x.shape)
    assert calls == {"convolve": 1, "input_gradient": 1}
    assert relative_error(y, wanted) <= tolerance
    assert relative_error(gradient, wanted_gradient) <= tolerance
    for found in (y, gradient):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert found.dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize(("size", "geometry"), GEOMETRIES)
def test_no_less_exact_than_onednn(dtype, size, geometry, monkeypatch):
    """One rounding of each value, however many pixels it is made of."""
    conv = convolution(160, 160, dtype, **geometry)
    x = draw_map(64, 160, *size, dtype=dtype)
    wanted, grad, wanted_gradient = exact(conv, x)
    module = frozen(conv)
    errors = []
    for work in (1, float("inf")):
        monkeypatch.setattr(small_maps, "LEAST_WORK", work)
        y, gradient = module.run(x), module.input_gradient(grad, x.shape)
        errors.append((relative_error(y, wanted), relative_error(gradient, wanted_gradient)))
    (ours, ours_gradient), (theirs, theirs_gradient) = errors
    # In float32 the order of a sum decides; in bf16 the rounding at the end does.
    slack = 1.5 if dtype is torch.float32 else 1.02
    assert ours <= slack * theirs
    assert ours_gradient <= slack * theirs_gradient


@pytest.mark.usefixtures("any_work")
@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        pytest.param((2, 2), {"kernel_size": 3, "padding": 1, "groups": 2}, id="grouped"),
        pytest.param((3, 3), {"kernel_size": 2, "dilation": 2}, id="dilated"),
        pytest.param((3, 3), {"kernel_size": 3, "padding": 1}, id="nine pixels come out"),
        pytest.param((5, 4), {"kernel_size": 3, "padding": 1, "stride": 4}, id="twenty pixels go in"),
        pytest.param((5, 5), {"kernel_size": 1}, id="1x1 of 5x5"),
        pytest.param((1, 1), {"kernel_size": 1, "padding": (0, 1)}, id="a pixel of padding alone"),
    ],
)
def test_what_is_left_to_onednn(size, geometry, calls):
    conv = convolution(6, 10, torch.float32, **geometry)
    x = draw_map(4, 6, *size, dtype=torch.float32)
    wanted, grad, wanted_gradient = exact(conv, x)
    module = frozen(conv)
    assert relative_error(module.run(x), wanted) <= 1e-6
    assert relative_error(module.input_gradient(grad, x.shape), wanted_gradient) <= 1e-6
    assert not calls


@pytest.mark.parametrize(
    ("size", "stride", "count", "pays"),
    [(2, 1, 16, True), (2, 1, 15, False), (1, 1, 1, True), (4, 2, 64, True), (4, 2, 63, False)],
)
def test_what_pays(size, stride, count, pays):
    """512 · 512 = 2¹⁸ multiplications for an image and a pixel."""
    conv = nn.Conv2d(512, 512, 3, padding=1, stride=stride)
    assert small_maps.pays(conv, (count, 512, size, size)) is pays


@pytest.mark.usefixtures("any_work")
def test_several_sizes_through_one_module(calls):
    conv = convolution(5, 9, torch.float32, kernel_size=3, padding=1)
    module = frozen(conv, "relu")
    for size in (2, 6, 1, 2):
        x = draw_map(3, 5, size, size, dtype=torch.float32)
        wanted, grad, wanted_gradient = exact(conv, x, "relu")
        assert relative_error(module.run(x), wanted) <= 1e-6
        assert relative_error(module.input_gradient(grad, x.shape), wanted_gradient) <= 1e-6
    assert calls == {"convolve": 3, "input_gradient": 3}


@pytest.mark.usefixtures("any_work")
@pytest.mark.parametrize("size", [1, 2])
def test_nan_shows_as_in_onednn(size):
    conv = convolution(8, 8, torch.float32, kernel_size=3, padding=1)
    x = draw_map(2, 8, size, size, dtype=torch.float32)
    x[1, 3, 0, 0] = float("nan")
    y = frozen(conv).run(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_weights_of_one_pixel_at_a_time(dtype):
    conv = convolution(256, 256, dtype, kernel_size=3, padding=1)
    module = frozen(conv)
    x = draw_map(16, 256, 2, 2, dtype=dtype)
    for call in (lambda: module.run(x), lambda: module.input_gradient(x, x.shape)):
        with StorageTracker([*conv.parameters(), x]) as tracker:
            result = call()
        assert tracker.now == result.nbytes
        assert tracker.peak <= 4 / 9 * conv.weight.nbytes + 2 * result.nbytes


@pytest.mark.parametrize(("name", "size", "convolutions"), [("vgg19", 32, 4), ("resnet18", 16, 3)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bf16"]
)
def test_whole_extractors(dtype, tolerance, name, size, convolutions, calls, draw_images):
    """Features and the images' gradient, against float64 and the plain convolutions' own error."""
    torch.manual_seed(3)
    exactly = build_extractor(name, image_size=size).double()
    extractor = copy.deepcopy(exactly).to(dtype)
    if not can_fuse(next(extractor.parameters())):
        pytest.skip("oneDNN has no such convolutions here")
    images = draw_images(16, dtype, size).requires_grad_()
    grad = torch.randn(len(images), extractor.num_features).to(dtype)

    def run(extractor: Extractor) -> tuple[Tensor, Tensor]:
        features = extractor.features(images.to(extractor.dtype))
        return features.detach(), *torch.autograd.grad(features, images, grad.to(extractor.dtype))

    wanted, plain = run(exactly), run(extractor)
    assert not calls
    criterion = Weighted(extractor, grad)
    leaf = images.detach().requires_grad_()
    FeaturePass(extractor, kernels="reference").loss(leaf, criterion).backward()
    found = (criterion.features(), leaf.grad)
    assert calls == {"convolve": convolutions, "input_gradient": convolutions}
    assert relative_error(found[0], wanted[0]) <= tolerance
    for mine, other, best in zip(found, plain, wanted, strict=True):
        # What differs besides is which values near 0 an activation's mask lets pass.
        assert relative_error(mine, best) <= 1.25 * relative_error(other, best) + 1e-6
