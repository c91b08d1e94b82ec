"""`import kernels`: what it costs, and the functions that choose a backend themselves."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch
from cases import MODULES, Activations, AveragerRun, backend
from oracle import relative_error

import kernels
from kernels import reference
from kernels.rules import RULES

OPERATIONS = (
    "relu_moments", "relu_moments_backward", "averager_step", "dataset_moments", "watch", "pairwise_sums", "nearest",
)  # fmt: skip
PIECES = ("difference", "average_moments", "direction", "matching_loss", "coefficients")


def test_importing_starts_neither_triton_nor_a_compiler() -> None:
    """TRITON_INTERPRET counts when Triton is imported, so that must not happen before the first call."""
    code = "import sys, kernels; print(*sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    loaded = set(run.stdout.split())
    assert "kernels.compiled.averaging" in loaded
    assert not {"triton", "torch._dynamo", "torch._inductor", "kernels.triton"} & loaded


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_backend_has_the_documented_signature(operation: str) -> None:
    documented = inspect.signature(getattr(kernels, operation))
    assert inspect.getdoc(getattr(kernels, operation))
    for name in MODULES:
        assert inspect.signature(getattr(backend(name), operation)) == documented


@pytest.mark.parametrize("name", MODULES)
def test_every_backend_has_the_pieces_of_the_paper(name: str) -> None:
    averaging = sys.modules[f"{backend(name).__name__}.averaging"]
    for piece in PIECES:
        function = getattr(averaging, piece)
        function = getattr(function, "fn", function)  # what Triton has made a kernel of
        assert function.__module__ == averaging.__name__, "its own, not another backend's"


def test_activations_go_to_the_selected_backend() -> None:
    case = Activations((5, 6, 3, 2), residual=True, bias=True)
    chosen = kernels.select("auto", torch.device("cpu"), torch.float32)
    found, expected = case.run(kernels), case.run(chosen)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    x, mean = torch.randn(4, 3, 2, 2), torch.empty(12, dtype=torch.float64)
    m2 = torch.empty_like(mean)
    kernels.dataset_moments(x, mean, m2, 0)
    assert relative_error(mean, x.flatten(1).double().mean(0)) <= 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_averager_step_goes_to_the_selected_backend(rule: str) -> None:
    run = AveragerRun(rule, weight=True)
    found, expected = run.run(kernels), run.run(kernels.select("auto", torch.device("cpu"), torch.float32))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


class TestPieces:
    """The paper's formulas one by one, in float64 against autograd and torch.optim."""

    def draw(self, count: int = 7, features: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, D] and a target [2, D]."""
        return torch.randn(count, features, dtype=torch.float64), torch.rand(2, features, dtype=torch.float64)

    @pytest.mark.parametrize("correction", [0, 1])
    def test_coefficients_are_the_gradient_of_the_matching_loss(self, correction: int) -> None:
        x, target = self.draw()
        x.requires_grad_()
        variance, mean = torch.var_mean(x, dim=0, correction=correction)
        v = torch.randn(2, 11, dtype=torch.float64)
        delta = kernels.difference(torch.stack((mean, variance)), target)
        (expected,) = torch.autograd.grad(kernels.matching_loss(v, delta).sum(), x)
        a, b = kernels.coefficients(v, mean.detach(), len(x), correction)
        assert relative_error(a + b * x, expected) <= 1e-13

    def test_equation_1_is_matched_along_twice_the_difference(self) -> None:
        _, delta = self.draw()
        delta.requires_grad_()
        (expected,) = torch.autograd.grad(kernels.matching_loss(delta, delta, "squares").sum(), delta)
        step = torch.zeros((), dtype=torch.int64)
        found = kernels.direction(
            "none", delta.detach(), delta, delta, delta, step, rate=0, beta1=0, beta2=0, eps=0, advance=True
        )
        assert torch.equal(found, expected)
        assert step == 0
        assert torch.equal(kernels.matching_loss(delta, delta, "mean squares") * 11, delta * delta / 11 * 11)

    def test_direction_of_ama_is_adam(self) -> None:
        v = torch.randn(2, 11, dtype=torch.float64)
        m, u, step = torch.zeros_like(v), torch.zeros_like(v), torch.zeros((), dtype=torch.int64)
        parameter = torch.nn.Parameter(v.clone())
        adam = torch.optim.Adam([parameter], lr=1e-2, betas=(0.9, 0.99), eps=1e-3)
        for _ in range(4):
            delta = torch.randn(2, 11, dtype=torch.float64)
            adam.zero_grad()
            (0.5 * (parameter - delta).square().sum()).backward()
            adam.step()
            found = kernels.direction(
                "ama", delta, v, m, u, step, rate=1e-2, beta1=0.9, beta2=0.99, eps=1e-3, advance=True
            )
            assert relative_error(found, parameter) <= 1e-13
        assert step == 4

    @pytest.mark.parametrize("rule", RULES)
    def test_compiled_pieces_are_the_reference_s(self, rule: str) -> None:
        """Row by row, and not compiled at all: the same formulas, written a second time."""
        from kernels.compiled import averaging as rows

        x, target = self.draw()
        scale = torch.rand(2, 11, dtype=torch.float64)
        variance, mean = torch.var_mean(x, dim=0)
        moments = torch.stack((mean, variance))
        state = {name: torch.rand(2, 11, dtype=torch.float64) for name in ("v", "m", "u")}
        own = [[state[name][row].clone() for name in RULES[rule].state] for row in range(2)]
        constants = tuple(torch.tensor(value).double() for value in (0.3, 0.1, 0.01, 1e-3, 0.1, 0.01))
        delta = reference.difference(moments, target, scale)
        step = torch.zeros((), dtype=torch.int64)
        v = reference.direction(
            rule, delta, *state.values(), step, rate=0.3, beta1=0.9, beta2=0.99, eps=1e-3, advance=True
        )
        for row in range(2):
            difference = rows.difference(moments[row], target[row], scale[row])
            found = rows.direction(rule, difference, own[row], constants, True)
            assert relative_error(difference, delta[row]) <= 1e-14
            assert relative_error(found, v[row]) <= 1e-6, "the constants are 1 − β in float32"
            form = RULES[rule].loss
            assert (
                relative_error(
                    rows.matching_loss(v[row], difference, form), reference.matching_loss(v, delta, form)[row]
                )
                <= 1e-14
            )
        count, dof = torch.tensor(7.0).double(), torch.tensor(6.0).double()
        for found, expected in zip(
            rows.coefficients(v[0], v[1], mean, count, dof), reference.coefficients(v, mean, 7, 1), strict=True
        ):
            assert relative_error(found, expected) <= 1e-14
