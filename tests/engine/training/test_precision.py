"""What --amp costs in exactness, on the paper's pair with weights that a training has shaped."""

from __future__ import annotations

import pytest
import torch

from engine.comparison.averagers import AMA, NoAverage
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.reference.target import MomentsKind
from engine.representation.build import build_extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.pretraining import pretrain
from pipelines import open_dataset

pytestmark = pytest.mark.slow

STEPS = {"vgg19": 12, "resnet18": 12}
MINIBATCH, REAL = 64, 256


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    digits = open_dataset("digits", None, image_size=32)
    files = []
    for name, steps in STEPS.items():
        files.append(folder / f"{name}.safetensors")
        pretrain(name, digits, steps=steps, amp=True, progress=False).save(files[-1])
    return build_extractor("vgg19+resnet18", image_size=32, weights=files)


def moments(extractor, images, dtype):
    """Of all features, in float64 and the public order, the extractor in `dtype`."""
    feature_pass = FeaturePass(extractor, dtype=dtype, kernels="reference")
    collector = MomentsKind().collector(feature_pass, len(images))
    for indices in torch.arange(len(images)).split(32):
        feature_pass.collect(images[indices], collector)
        collector.end_batch(indices)
    return Moments(collector.count, *(collector.order.to_public(part) for part in (collector.mean, collector.m2)))


def test_bfloat16_points_the_same_way(extractor):
    """Cosine of ∂L/∂images ≥ 0.999 for AMA's first step and for no averager; target in the same precision."""
    digits = torch.from_numpy(open_dataset("digits", None, image_size=32).images).permute(0, 3, 1, 2) / 127.5 - 1
    digits = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))].float()
    real, images = digits[:REAL], 0.7 * digits[REAL : REAL + MINIBATCH] + 0.1
    targets = {dtype: moments(extractor, real, dtype) for dtype in (torch.float32, torch.bfloat16)}
    full, low = targets[torch.float32], targets[torch.bfloat16]
    sizes = [tap.num_features for tap in extractor.taps]
    for what in ("mean", "m2"):
        pairs = zip(getattr(low, what).split(sizes), getattr(full, what).split(sizes), strict=True)
        errors = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
        print(f"{what} per tap: median relative error {errors.median():.1e}, largest {errors.max():.1e}")
        assert errors.max() <= 0.05
    for averager in (AMA, NoAverage):
        gradients = []
        for dtype in (None, torch.bfloat16):
            x = images.clone().requires_grad_()
            objective = MomentMatching(extractor, targets[dtype or torch.float32], averager(), amp_dtype=dtype)
            objective(x).backward()
            gradients.append(x.grad.flatten().double())
        cosine = float(torch.cosine_similarity(*gradients, dim=0))
        print(f"{averager.__name__}: cosine of ∂L/∂images in bfloat16 and float32 {cosine:.6f}")
        assert cosine >= 0.999
