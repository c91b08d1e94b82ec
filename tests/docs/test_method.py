"""The formulas of docs/method.md, as the page writes them, against autograd in float64."""

from __future__ import annotations

import re

import pytest
import torch
from page_checks import ROOT
from torch import Tensor

N = 7


@pytest.fixture
def x() -> Tensor:
    """[N] values of one feature, a leaf."""
    return torch.randn(N, dtype=torch.float64).requires_grad_()


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def coefficients(v: tuple[Tensor, Tensor], m: Tensor, c: int) -> tuple[Tensor, Tensor]:
    b = -2 * v[1] / (N - c)
    return -v[0] / N - b * m, b


@pytest.mark.parametrize("c", [0, 1])
@pytest.mark.parametrize("loss", ["direction", "squares", "average of moments", "scaled feature"])
def test_identity_1(c: int, loss: str, x: Tensor) -> None:
    target = torch.randn(2, dtype=torch.float64)
    moments = torch.stack((x.mean(), x.var(correction=c)))
    delta = target - moments
    if loss == "direction":
        v = torch.randn(2, dtype=torch.float64)
        value = v @ delta
    elif loss == "squares":
        value, v = delta.square().sum(), 2 * delta
    elif loss == "average of moments":
        alpha, features = 0.3, 5
        rest = target - ((1 - alpha) * torch.randn(2, dtype=torch.float64) + alpha * moments)
        value, v = rest.square().sum() / features, 2 * alpha / features * rest
    else:
        w, direction = 1.7, torch.randn(2, dtype=torch.float64)
        value = direction @ (target - torch.stack(((w * x).mean(), (w * x).var(correction=c))))
        v = direction * torch.tensor([w, w**2], dtype=torch.float64)
    a, b = coefficients((v[0].detach(), v[1].detach()), x.mean().detach(), c)
    torch.testing.assert_close(gradient(value, x), (a + b * x).detach())


def test_identity_1_of_a_population(x: Tensor) -> None:
    beta, mu_e, q_e, mu, sigma, w_mu, w_sigma = torch.rand(7, dtype=torch.float64)
    mean = beta * mu_e + (1 - beta) * x.mean()
    deviation = beta * q_e + (1 - beta) * x.square().mean() - mean.square()
    loss = w_mu * (mean - mu).square() + w_sigma * (deviation - sigma).square()
    b = (1 - beta) / N * 4 * w_sigma * (deviation - sigma)
    a = (1 - beta) / N * (2 * w_mu * (mean - mu) - 4 * w_sigma * (deviation - sigma) * mean)
    torch.testing.assert_close(gradient(loss, x), (a + b * x).detach())


@pytest.mark.parametrize("share", [1, 2, 5])
def test_identity_2(share: int, x: Tensor) -> None:
    values = x.detach()
    (n_a, n_b), (one, other) = (share, N - share), (values[:share], values[share:])
    delta = other.mean() - one.mean()
    m2 = sum(part.var(correction=0) * len(part) for part in (one, other)) + delta.square() * n_a * n_b / N
    torch.testing.assert_close(one.mean() + delta * n_b / N, values.mean())
    torch.testing.assert_close(m2, values.var(correction=0) * N)


def test_a_mean_over_features_acts_as_another_epsilon() -> None:
    """One Adam step of PyTorch's on the authors' inner loss, and on the paper's with ε·D/2."""
    features, eps = 50, 1e-3
    delta = torch.randn(features, dtype=torch.float64)
    authors, paper = torch.zeros(2, features, dtype=torch.float64).unbind()
    for v, own_eps, factor in ((authors, eps, 1 / features), (paper, eps * features / 2, 0.5)):
        v.requires_grad_()
        adam = torch.optim.Adam([v], lr=0.1, betas=(0.5, 0.999), eps=own_eps)
        for _ in range(3):
            adam.zero_grad()
            (factor * (v - delta).square().sum()).backward()
            adam.step()
    torch.testing.assert_close(authors, paper)


def test_every_identity_has_a_derivation_and_names_its_code() -> None:
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    identities = [section for section in sections if section.startswith("Identity ")]
    assert [section.split(":")[0] for section in identities] == [f"Identity {number}" for number in range(1, 6)]
    for section in identities:
        assert "*Derivation.*" in section
        assert "∎" in section
        assert re.search(r"\*\*In the code:\*\*.*\]\(\.\./[\w/]+\.py\)", section, re.DOTALL)
