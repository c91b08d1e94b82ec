"""A generator in low precision against `torch.autocast`, bit for bit."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers.marks import quick

from engine.generation.low_precision import LowPrecision
from engine.generation.networks import build_generator, run_generator

NETWORKS = (("dcgan", "transposed"), ("dcgan", "bilinear"), ("resnet", ""))
CASES = [
    (*network, dtype, recompute)
    for network, dtype, recompute in itertools.product(NETWORKS, (torch.bfloat16, torch.float16), (False, True))
]
TRANSPOSED, BILINEAR, _ = NETWORKS
QUICK = [(*TRANSPOSED, torch.bfloat16, False), (*BILINEAR, torch.bfloat16, True), (*TRANSPOSED, torch.float16, True)]


@pytest.mark.parametrize(("name", "upsampling", "dtype", "recompute"), quick(CASES, QUICK))
def test_as_under_autocast(name: str, upsampling: str, dtype: torch.dtype, recompute: bool) -> None:
    options = {"upsampling": upsampling} if upsampling else {}
    generator = build_generator(name, image_size=32, nz=10, **options)
    twin = copy.deepcopy(generator)
    low = LowPrecision(generator, dtype)
    ours = torch.optim.Adam(generator.parameters(), 1e-3, fused=True)
    theirs = torch.optim.Adam(twin.parameters(), 1e-3, fused=True)
    for _ in range(3):  # weights that have changed must be converted again
        z = torch.randn(6, 10)
        for optimizer in (ours, theirs):
            optimizer.zero_grad(set_to_none=True)
        images = low.images(z, recompute=recompute)
        with torch.autocast("cpu", dtype):
            expected = run_generator(twin, z, recompute=recompute)
        assert images.dtype == dtype
        assert torch.equal(images, expected)
        upstream = torch.randn_like(images)
        images.backward(upstream)
        low.collect_gradients()
        expected.backward(upstream)
        for (key, own), other in zip(generator.named_parameters(), twin.parameters(), strict=True):
            assert own.dtype == own.grad.dtype == torch.float32
            assert torch.equal(own.grad, other.grad), key
        ours.step()
        theirs.step()
    for own, other in zip(generator.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(own, other)
