"""Frozen convolutions against the plain ones."""

from __future__ import annotations

import pytest
import torch
from helpers.visiting import enliven
from oracle import in_float64, relative_error, tapped
from torch import nn

from engine.representation.build import build_extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.tracing.convolutions import FrozenConv2d, FusedConv2d, can_fuse

DTYPES = [
    pytest.param(torch.float32, 1e-5, id="float32"),
    pytest.param(torch.bfloat16, 2e-2, id="bf16"),
]
GEOMETRIES = [
    pytest.param({"kernel_size": 3, "padding": 1}, id="3x3"),
    pytest.param({"kernel_size": 3, "padding": 1, "stride": 2}, id="stride 2"),
    pytest.param({"kernel_size": 1}, id="1x1"),
    pytest.param({"kernel_size": 1, "stride": 2}, id="1x1 stride 2"),
    pytest.param({"kernel_size": 4, "stride": 2, "padding": 1}, id="4x4 stride 2"),
    pytest.param({"kernel_size": (5, 3), "padding": (1, 2)}, id="5x3"),
    pytest.param({"kernel_size": 3, "padding": 4}, id="padding beyond the kernel"),
    pytest.param({"kernel_size": 3, "padding": 2, "dilation": 2}, id="dilated"),
    pytest.param({"kernel_size": 3, "padding": 1, "groups": 2}, id="grouped"),
    pytest.param({"kernel_size": 3, "padding": 1, "bias": False}, id="no bias"),
]


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_one_convolution(dtype, tolerance, geometry, activation):
    conv = nn.Conv2d(6, 10, **geometry).requires_grad_(False).to(dtype, memory_format=torch.channels_last)
    if not can_fuse(conv.weight):
        pytest.skip("oneDNN has no such convolution here")
    frozen = FusedConv2d(conv, activation)
    for count in (4, 3):
        x = (3 * torch.randn(count, 6, 9, 8)).to(dtype, memory_format=torch.channels_last).requires_grad_()
        exact = torch.nn.functional.conv2d(
            x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double(),
            conv.stride, conv.padding, conv.dilation, conv.groups,
        )  # fmt: skip
        grad = torch.randn(exact.shape).to(dtype, memory_format=torch.channels_last)
        # The mask is the tap's: the frozen backward takes the gradient of the convolution's own result.
        (expected,) = torch.autograd.grad(exact, x, grad.double())
        y = frozen.run(x.detach())
        found, same = (frozen.input_gradient(grad, of) for of in (x.shape, torch.full_like(x, float("nan")).detach()))
        assert torch.equal(found, same), "of the input only the shape matters"
        wanted = {"none": exact, "relu": exact.relu(), "relu6": exact.clamp(0, 6)}[activation]
        assert relative_error(y, wanted) <= tolerance
        assert relative_error(found, expected) <= tolerance
        assert found.shape == x.shape


class Sequence(nn.Module):
    """A convolution for every case: first tap, plain, before an addition, shared, not tapped."""

    def __init__(self):
        super().__init__()
        self.first, self.plain = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.added, self.shared = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 5, 3, stride=2, padding=1)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.plain(x).relu()
        x = (self.added(x) + x).relu()
        x = self.shared(self.shared(x).relu()).relu()
        return nn.functional.relu6(self.last(x))


def test_which_activations_are_applied():
    extractor = tapped(enliven(Sequence(), torch.Generator()), image_size=8)
    prepared = FeaturePass(extractor).prepared
    assert [site.applied for site in prepared.sites] == [False, True, False, False, False, True]
    assert [site.applied for site in extractor.sites] == [False] * 6
    assert [site.activation for site in prepared.sites] == [site.activation for site in extractor.sites]


def test_subclasses_do_what_they_like():
    """timm's convolutions with TensorFlow's "same" padding say padding 0, and pad their images themselves."""
    pytest.importorskip("timm")
    extractor = build_extractor("efficientnet-lite0", image_size=32)
    prepared = FeaturePass(extractor).prepared
    padded = [module for module in prepared.modules() if type(module).__name__ == "Conv2dSame"]
    assert padded
    assert any(isinstance(module, FusedConv2d) for module in prepared.modules())
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(prepared.features(x), extractor.features(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_one_plain_convolution_without_its_bias(geometry):
    conv = nn.Conv2d(6, 10, **geometry).requires_grad_(False).double()
    x = torch.randn(3, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    y = conv(x)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    bias = 0 if conv.bias is None else conv.bias.view(1, -1, 1, 1)
    assert relative_error(FrozenConv2d(conv, bias=False).run(x.detach()) + bias, y) <= 1e-14
    assert torch.equal(FrozenConv2d(conv).run(x.detach()), y)
    assert relative_error(FrozenConv2d(conv).input_gradient(grad, x.shape), expected) <= 1e-14


def test_whose_bias_is_left_to_the_tap():
    """Where oneDNN has no convolution: that of a tap alone, its shortcut's with it, but not a shared convolution's."""
    extractor = in_float64(tapped(enliven(Sequence(), torch.Generator()), image_size=8))
    prepared = FeaturePass(extractor).prepared
    assert [site.bias is not None for site in prepared.sites] == [True, True, True, False, False, True]
    assert all(site.bias is None for site in extractor.sites)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(prepared.features(x), extractor.features(x)) <= 1e-14


def test_a_shortcut_s_bias_joins_its_tap_s():
    """A residual network's shortcut with a convolution: both biases are added in the tap, once."""

    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.around = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return (self.main(x) + self.around(x)).relu()

    network = Shortcut()
    extractor = in_float64(tapped(network, image_size=8))
    (site,) = FeaturePass(extractor).prepared.sites
    torch.testing.assert_close(site.bias, (network.main.bias + network.around.bias).double(), rtol=1e-6, atol=0)


def test_weights_are_shared(tiny_extractor):
    prepared = FeaturePass(tiny_extractor).prepared
    own = {id(parameter) for parameter in tiny_extractor.parameters()}
    assert prepared is not tiny_extractor
    assert {id(parameter) for parameter in prepared.parameters()} <= own
