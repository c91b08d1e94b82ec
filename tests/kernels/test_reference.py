"""The oracle itself, against PyTorch's own variance, autograd and Adam."""

from __future__ import annotations

import pytest
import torch
from cases import ACTIVATIONS, LAYOUTS, Activations, AveragerRun
from oracle import relative_error
from torch import Tensor

from kernels import reference
from kernels.layout import feature_rows

FUNCTIONS = {"relu": torch.relu, "relu6": torch.nn.functional.relu6, "none": lambda x: x}


def activate(case: Activations, x: Tensor) -> Tensor:
    value = x + case.inputs["bias"].view(1, -1, 1, 1) if case.bias else x
    return FUNCTIONS[case.activation](value + case.inputs["residual"] if case.residual else value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sums", [False, True], ids=["plain", "bias+residual"])
def test_moments_are_those_of_var_mean(layout: str, activation: str, sums: bool) -> None:
    case = Activations((6, 3, 5, 7), torch.float64, layout, activation, sums, sums, scale=4)
    found = case.run(reference)
    y = activate(case, case.inputs["x"])
    variance, mean = torch.var_mean(feature_rows(y), dim=0, correction=0)
    assert torch.equal(found["y"], y)
    assert relative_error(found["mean"], mean) <= 1e-14
    assert relative_error(found["m2"], variance * 6) <= 1e-14


def test_moments_of_a_union_are_those_of_all_its_images() -> None:
    whole = Activations((9, 4, 3, 3), torch.float64)
    mean, m2 = torch.empty(36, dtype=torch.float64), torch.empty(36, dtype=torch.float64)
    count = 0
    for part in whole.inputs["x"].split((1, 5, 3)):
        reference.relu_moments(part.clone(memory_format=torch.channels_last), mean, m2, count)
        count += len(part)
    expected = whole.run(reference)
    assert relative_error(mean, expected["mean"]) <= 1e-14
    assert relative_error(m2, expected["m2"]) <= 1e-13


@pytest.mark.parametrize("shortcut", [False, True], ids=["", "shortcut"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_is_autograd_of_an_affine_gradient(activation: str, shortcut: bool) -> None:
    case = Activations((5, 3, 2, 2), torch.float64, activation=activation, scale=4, residual=shortcut)
    x = case.inputs["x"].clone().requires_grad_()
    y = activate(case, x)
    rows = feature_rows(y)
    # d/dy of these terms is grad, a and b·y.
    arriving = case.inputs["grad"] + case.inputs["residual"] if shortcut else case.inputs["grad"]
    loss = (arriving * y).sum() + (case.inputs["a"] * rows + case.inputs["b"] * rows.square() / 2).sum()
    (expected,) = torch.autograd.grad(loss, x)
    assert relative_error(case.run(reference)["grad"], expected) <= 1e-14


@pytest.mark.parametrize("correction", [0, 1])
def test_coefficients_are_the_gradient_of_the_loss(correction: int) -> None:
    """L = Σ v^μ (μ − m) + v^σ (σ − s) with v fixed, and ∂L/∂x = a + b·x."""
    run = AveragerRun("ama", correction=correction, features=11, advances=(False,))
    x = torch.randn(run.count, 11, dtype=torch.float64, requires_grad=True)
    variance, mean = torch.var_mean(x, dim=0, correction=correction)
    run.inputs["mean0"], run.inputs["m20"] = mean.detach(), variance.detach() * (run.count - correction)
    found = run.run(reference, torch.float64)
    own = {name: value.double() for name, value in run.inputs.items()}
    terms = own["v"] * torch.stack((own["target_mean0"] - mean, own["target_variance0"] - variance))
    (expected,) = torch.autograd.grad(terms.sum(), x)
    assert relative_error(found["a0"] + found["b0"] * x, expected) <= 1e-13
    assert relative_error(found["sums0"][:2], terms.detach().sum(dim=1)) <= 1e-13


def test_ama_is_adam_on_half_the_squared_distance_to_the_difference() -> None:
    run = AveragerRun("ama", advances=(True,) * 5)
    v = run.inputs["v"].double().requires_grad_()
    adam = torch.optim.Adam([v], lr=run.rate, betas=(run.beta1, run.beta2), eps=run.eps)
    for n in range(5):
        own = {name: value.double() for name, value in run.inputs.items()}
        difference = torch.stack(
            (own[f"target_mean{n}"] - own[f"mean{n}"], own[f"target_variance{n}"] - own[f"m2{n}"] / (run.count - 1))
        )
        adam.zero_grad()
        (0.5 * (v - difference).square().sum()).backward()
        adam.step()
    found = run.run(reference, torch.float64)
    assert found["step"] == 5
    assert relative_error(found["v"], v) <= 1e-13
    assert relative_error(found["sums4"][0], (v[0] * difference[0]).sum()) <= 1e-12
