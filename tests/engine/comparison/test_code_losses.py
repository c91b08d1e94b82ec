"""Losses of codes in float64 against torch.distributions and sums over all pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from engine.comparison.code_losses import kl_to_normal, root_mmd_of_codes, wae_mmd
from engine.support.errors import InputError

NZ = 3


def codes(count: int, seed: int, spread: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(count, NZ, generator=random, dtype=torch.float64)).requires_grad_()


def gradients(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves))


def test_kl_is_that_of_torch() -> None:
    mean, log_variance = codes(5, 1, 2.0), codes(5, 2, 3.0)
    found, upstream = kl_to_normal(mean, log_variance), torch.randn(5, dtype=torch.float64)
    law = torch.distributions.Normal(mean, (log_variance / 2).exp())
    normal = torch.distributions.Normal(torch.zeros(NZ).double(), torch.ones(NZ).double())
    expected = torch.distributions.kl_divergence(law, normal).sum(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        gradients(found @ upstream, mean, log_variance), gradients(expected @ upstream, mean, log_variance), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert kl_to_normal(torch.zeros(1, NZ), torch.zeros(1, NZ)).item() == 0


def imq(x: Tensor, y: Tensor, variance: float) -> Tensor:
    constants = [2 * NZ * variance * s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10)]
    return sum(c / (c + ((x - y) ** 2).sum()) for c in constants)


@pytest.mark.parametrize("variance", [1.0, 1 / 3])
def test_wae_mmd_is_the_sum_over_pairs(variance: float) -> None:
    x, z = codes(5, 3, 0.5), codes(4, 4)
    within = sum(imq(a, b, variance) for a, b in itertools.permutations(x, 2)) / 20
    of_prior = sum(imq(a, b, variance) for a, b in itertools.permutations(z, 2)) / 12
    across = sum(imq(a, b, variance) for a, b in itertools.product(x, z)) / 20
    expected, found = within + of_prior - 2 * across, wae_mmd(x, z, variance)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(found, x), gradients(expected, x), rtol=1e-8, atol=1e-12)
    with pytest.raises(InputError):
        wae_mmd(x[:1], z)


def test_root_mmd_is_the_sum_over_pairs() -> None:
    drawn, real, bandwidths = codes(4, 5, 0.5), codes(6, 6), (0.5, 2.0)
    fixed = real.detach()
    unit = sum(((a - b) ** 2).sum() for a, b in itertools.permutations(fixed, 2)) / 30

    def mean(x: Tensor, y: Tensor) -> Tensor:
        pairs = [((a - b) ** 2).sum() for a, b in itertools.product(x, y)]
        return sum(torch.exp(-d / (2 * s**2 * unit)) for d in pairs for s in bandwidths) / len(pairs)

    expected = (mean(drawn, drawn) + mean(fixed, fixed) - 2 * mean(drawn, fixed) + 1e-6).sqrt()
    found = root_mmd_of_codes(drawn, real, bandwidths)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(found, drawn), gradients(expected, drawn), rtol=1e-8, atol=1e-12)
    same = root_mmd_of_codes(drawn, drawn, bandwidths)
    assert same.item() == pytest.approx(math.sqrt(1e-6), rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients(same, drawn))
