"""Losses of denoised features and of learned moments, in float64 against sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from test_games import outputs
from torch import Tensor

from engine.comparison.games.denoising import denoising_error, denoising_generator
from engine.comparison.games.learned_moments import moment_distance, norm_penalty
from engine.support.errors import InputError

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def check_gradients(found: Tensor, inputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """With a random upstream gradient u: `expected` has a row ∂found_i/∂input of each of found's numbers."""
    upstream = torch.randn(found.shape, dtype=torch.float64)
    weighed = tuple(torch.tensordot(upstream, rows, dims=upstream.dim()) for rows in expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, upstream), weighed, **EXACT)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 7), (13, 3)])
def test_denoising_error(count: int, size: int) -> None:
    features, denoised = outputs(count, size, 1).requires_grad_(), outputs(count, size, 2).requires_grad_()
    found = denoising_error(features, denoised)
    off = (features - denoised).detach()
    expected = torch.tensor([sum(float(v) ** 2 for v in row) / size for row in off], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, **EXACT)
    rows = torch.stack([torch.zeros_like(off).index_copy(0, torch.tensor([i]), 2 * off[i : i + 1] / size)
                        for i in range(count)])  # fmt: skip
    check_gradients(found, (features, denoised), (rows, -rows))


@pytest.mark.parametrize(("adversarial", "denoising"), [(1.0, 0.03), (0.03, 1.0), (0.0, 2.0)])
def test_denoising_generator(adversarial: float, denoising: float) -> None:
    fake = outputs(6, 1, 1).requires_grad_()
    errors = outputs(6, 1, 2).squeeze(1).square().requires_grad_()
    found = denoising_generator(fake, errors, adversarial=adversarial, denoising=denoising)
    game = [math.log1p(math.exp(-g)) for (g,) in fake.tolist()]
    expected = adversarial * sum(game) / 6 + denoising * sum(errors.tolist()) / 6
    torch.testing.assert_close(found.item(), expected, **EXACT)
    slope = torch.tensor([[-adversarial / 6 / (1 + math.exp(g))] for (g,) in fake.tolist()], dtype=torch.float64)
    check_gradients(found, (fake, errors), (slope, torch.full((6,), denoising / 6, dtype=torch.float64)))


@pytest.mark.parametrize("size", [1, 17])
def test_moment_distance(size: int) -> None:
    real, fake = (outputs(size, 1, seed).squeeze(1).requires_grad_() for seed in (1, 2))
    found = moment_distance(real, fake)
    off = (fake - real).detach()
    torch.testing.assert_close(found.item(), sum(v * v for v in off.tolist()) / 2, **EXACT)
    check_gradients(found, (real, fake), (-off, off))


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_norm_penalty(weight: float) -> None:
    gradient = outputs(9, 1, 3).squeeze(1).requires_grad_()
    squared = sum(v * v for v in gradient.tolist())
    found = norm_penalty(gradient, weight)
    torch.testing.assert_close(found.item(), weight * (squared - 1) ** 2, **EXACT)
    check_gradients(found, (gradient,), (4 * weight * (squared - 1) * gradient.detach(),))
    assert torch.autograd.gradgradcheck(lambda g: norm_penalty(g, weight), gradient)


def test_half_precision_is_summed_in_float32() -> None:
    many = torch.full((70_000,), 0.1, dtype=torch.float16)
    assert norm_penalty(many, 1.0).item() == pytest.approx((70_000 * many[0].double().item() ** 2 - 1) ** 2, rel=1e-3)
    assert moment_distance(many, -many).dtype == torch.float32
    assert denoising_error(many[None], -many[None]).item() == pytest.approx(0.04, rel=1e-3)


def test_refusals() -> None:
    x = torch.ones(3, 2)
    cases = [
        (lambda: denoising_error(x[0], x[0]), "features"),
        (lambda: denoising_error(x, x[:2]), "denoised"),
        (lambda: denoising_generator(x, x[:, 0], adversarial=1, denoising=1), "fake"),
        (lambda: denoising_generator(x[:, :1], x, adversarial=1, denoising=1), "errors"),
        (lambda: moment_distance(x, x), "real"),
        (lambda: moment_distance(x[0], x[:, 0]), "fake"),
        (lambda: norm_penalty(x, 1.0), "gradient"),
    ]
    for call, argument in cases:
        with pytest.raises(InputError) as error:
            call()
        assert error.value.argument == argument
        assert "\n" not in str(error.value)
