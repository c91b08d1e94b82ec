"""An extractor without autograd, against autograd through the traced graph."""

from __future__ import annotations

import pytest
import torch
from helpers.criteria import Weighted
from helpers.visiting import enliven
from oracle import in_float64, relative_error, tapped
from torch import Tensor, nn

from engine.representation.build import build_extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.tracing.tape import Arriving

# Concatenations, squeeze-and-excitation, channel shuffles, smooth activations, shortcuts of all kinds.
EXTRACTORS = {
    "vgg19": 32,
    "resnet18": 32,
    "vgg-small+resnet18": 8,
    "dcgan-encoder": 32,
    "torchvision:resnet18": 32,
    "torchvision:densenet121": 32,
    "torchvision:googlenet": 32,
    "torchvision:shufflenet_v2_x0_5": 32,
    "torchvision:mobilenet_v3_small": 32,
    "torchvision:convnext_tiny": 32,
    "torchvision:squeezenet1_1": 64,
    "timm:tf_efficientnet_lite0": 32,
}


@pytest.mark.parametrize("recompute", ["none", "stages"])
@pytest.mark.parametrize("name", EXTRACTORS)
def test_gradient_is_autograd_s(name: str, recompute: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(3)
    size = EXTRACTORS[name]
    extractor = in_float64(build_extractor(name, image_size=size, weights=None))
    images = (torch.rand(2, 3, size, size, dtype=torch.float64) * 2 - 1).requires_grad_()
    weights = torch.randn(2, extractor.num_features, dtype=torch.float64)
    (expected,) = torch.autograd.grad((weights * extractor.features(images)).sum(), images)
    assert expected.abs().max() > 0
    FeaturePass(extractor, recompute=recompute).loss(images, Weighted(extractor, weights)).backward()
    assert relative_error(images.grad, expected) <= 1e-12


def test_batch_statistics(draw_images) -> None:
    extractor = in_float64(build_extractor("resnet18", image_size=8, bn="batch", layers=6))
    images = draw_images(4).requires_grad_()
    weights = torch.randn(4, extractor.num_features, dtype=torch.float64)
    (expected,) = torch.autograd.grad((weights * extractor.features(images)).sum(), images)
    FeaturePass(extractor).loss(images, Weighted(extractor, weights)).backward()
    assert relative_error(images.grad, expected) <= 1e-12


class Tuples(nn.Module):
    """Values that are no tensors, or several; readers of one part alone; a branch that no tap reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 4))
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)) * self.scale
        count = y.shape[0] + 1
        left, right = (self.second(y) * count).chunk(2, dim=1)
        values, _ = torch.cat([left, right.sigmoid()], dim=1).sort(dim=1)
        return torch.relu(self.third(values[:, :4]) + torch.relu(self.third(left)).mean(dim=(2, 3), keepdim=True))


def test_tuples_and_numbers(draw_images) -> None:
    extractor = in_float64(tapped(enliven(Tuples()), image_size=8))
    images = draw_images(3).requires_grad_()
    weights = torch.randn(3, extractor.num_features, dtype=torch.float64)
    (expected,) = torch.autograd.grad((weights * extractor.features(images)).sum(), images)
    FeaturePass(extractor).loss(images, Weighted(extractor, weights)).backward()
    assert relative_error(images.grad, expected) <= 1e-12


class TestArriving:
    """Sums of the gradients that come back to one value."""

    def test_what_others_read_is_not_changed(self) -> None:
        shared = [torch.randn(2, 3, 2, 2) for _ in range(3)]
        kept = [tensor.clone() for tensor in shared]
        arriving = Arriving()
        for tensor in shared:
            arriving.add(tensor, owned=False)
        y = torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        own, other = arriving.for_tap(y)
        own.zero_()
        if other is not None:
            assert any(other is tensor for tensor in shared)
        assert all(map(torch.equal, shared, kept))

    @pytest.mark.parametrize("owned", [(True, True, False), (False, True, True), (True, False, False), (False,) * 3])
    def test_sums(self, owned: tuple[bool, ...]) -> None:
        gradients = [torch.randn(2, 3, 2, 2, dtype=torch.float64) for _ in owned]
        expected = torch.stack(gradients).sum(dim=0)
        total, for_tap = Arriving(), Arriving()
        for gradient, own in zip(gradients, owned, strict=True):
            total.add(gradient.clone(), owned=own)
            for_tap.add(gradient.clone(), owned=own)
        found = total.total()
        assert found is not None
        torch.testing.assert_close(found, expected)
        y = torch.zeros_like(expected).contiguous(memory_format=torch.channels_last)
        own_part, rest = for_tap.for_tap(y)
        torch.testing.assert_close(own_part if rest is None else own_part + rest, expected)
        assert own_part.is_contiguous(memory_format=torch.channels_last)

    def test_nothing_came(self) -> None:
        assert Arriving().total() is None
        own, rest = Arriving().for_tap(torch.ones(1, 2, 3, 3))
        assert torch.equal(own, torch.zeros(1, 2, 3, 3))
        assert rest is None
