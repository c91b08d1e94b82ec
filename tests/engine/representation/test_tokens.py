"""Vision transformers of timm, as timm runs them."""

from __future__ import annotations

import pytest
import torch

from engine.comparison.distances import MMD, kernels
from engine.comparison.distances.moments import Moments
from engine.comparison.on_features import OnFeatures
from engine.configuration.build import make_generator, make_method
from engine.configuration.config import Config
from engine.representation.build import build_extractor
from engine.support.errors import InputError

timm = pytest.importorskip("timm")
NAME = "vit_tiny_patch16_224"


class TestTokens:
    def test_are_timm_s(self, tmp_path):
        """After every block and after the last norm, with weights from a file that timm's own names are in."""
        torch.manual_seed(0)
        model = timm.create_model(NAME, dynamic_img_size=True).eval()
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        extractor = build_extractor(f"timm:{NAME}", image_size=48, weights=tmp_path / "weights.pth")
        assert [tap.shape for tap in extractor.taps] == [(192, 10, 1)] * 13
        images = torch.rand(2, 3, 48, 48) * 2 - 1
        with torch.no_grad():
            last, blocks = model.forward_intermediates(
                (images / 2 + 0.5 - 0.5) / 0.5, output_fmt="NLC", return_prefix_tokens=True
            )
            found = extractor.features(images).unflatten(1, (13, 192, 10)).transpose(2, 3)
        for tap, (patches, prefix) in enumerate(blocks):
            torch.testing.assert_close(found[:, tap], torch.cat([prefix, patches], dim=1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[:, 12], last, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("recompute", ["none", "stages"])
    def test_gradient_through_chunks(self, recompute):
        torch.manual_seed(0)
        extractor = build_extractor(f"timm:{NAME}", image_size=32, weights=None, layers=2).double()
        images = (torch.rand(5, 3, 32, 32).double() * 2 - 1).requires_grad_()
        distance = MMD(torch.randn(7, 2 * 192).double(), kernels.gaussian((10.0,)))
        tokens = extractor.features(images).unflatten(1, (2, 192, 5)).mean(dim=3).flatten(1)
        expected = distance(tokens)
        (gradient,) = torch.autograd.grad(expected, images)
        loss = OnFeatures(extractor, distance, pool="mean", chunk_size=2, recompute=recompute)(images)
        (found,) = torch.autograd.grad(loss, images)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-12)

    def test_size_that_is_no_number_of_patches(self):
        with pytest.raises(InputError, match="divisible by patch size") as error:
            build_extractor(f"timm:{NAME}", image_size=40)
        assert error.value.argument == "name"

    def test_are_pooled_by_their_mean_unless_somebody_says_otherwise(self):
        given = {"method": "mmd", "extractor": f"vgg-small+timm:{NAME}"}
        assert Config.build("digits", given).features.pool == "mean"
        assert Config.build("photos", {**given, "data": "x", "pool": "mean+std"}).features.pool == "mean+std"
        assert Config.build("digits", {"method": "mmd"}).features.pool == "grid4"

    def test_gfmn_is_refused(self):
        config = Config.build("digits", {"extractor": f"timm:{NAME}", "layers": 1, "weights": ("random",)})
        extractor = build_extractor(f"timm:{NAME}", image_size=32, layers=1)
        zeros = torch.zeros(extractor.num_features)
        with pytest.raises(InputError, match="has tokens") as error:
            make_method(config, make_generator(config), extractor, Moments(2, zeros, zeros))
        assert error.value.argument == "method"
