"""Inputs for the three operations, and what float64 `reference` makes of them."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.layout import accumulation_dtype, feature_rows

MODULES = {"reference": "kernels.reference", "compiled": "kernels.compiled", "triton": "kernels.triton"}
ACTIVATIONS = ("relu", "relu6", "none")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# Norm-wise relative errors of (activations and gradients, moments): one rounding of every value to the dtype (Triton's
# interpreter truncates to bfloat16 instead of rounding), and float32 sums around a pilot.
TOLERANCE = {
    torch.float64: (1e-14, 1e-12),
    torch.float32: (2e-7, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (5e-3, 1e-2),
}


def backend(name: str) -> ModuleType:
    module = importlib.import_module(MODULES[name])
    if name == "triton" and device_of(name) == "cpu":
        assert module.INTERPRETED, "Triton was imported before tests/kernels/conftest.py could ask for its interpreter"
    return module


def device_of(name: str) -> str:
    return "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"


def shape_cases(shapes: Iterable[str], modules: Iterable[str], largest: str) -> list[Any]:
    """For `parametrize`: every shape, dtype and module by name; the `largest` of low precision, and of float64, are
    slow tests in Triton's interpreter."""
    return [
        pytest.param(
            shape, dtype, name, id=f"{shape}-{dtype_id(dtype)}-{name}",
            marks=[pytest.mark.slow] if shape == largest and name == "triton" and dtype != torch.float32 else [],
        )
        for shape, dtype, name in itertools.product(shapes, TOLERANCE, modules)
    ]  # fmt: skip


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@dataclass
class Activations:
    """Random arguments of `relu_moments` and of the backward that follows it.

    Attributes:
        shape: (N, C, H, W).
        count: images merged before; the running moments are then random.
        offset, scale: of the normal values of x.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    activation: str = "relu"
    bias: bool = False
    residual: bool = False
    count: int = 0
    offset: float = 0.0
    scale: float = 2.0
    device: str = "cpu"
    accumulation: torch.dtype | None = None
    inputs: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _, channels, height, width = self.shape
        features = channels * height * width
        accumulation = self.accumulation or accumulation_dtype(self.dtype)
        self.inputs = {
            "x": self.offset + self.scale * self._draw(*self.shape),
            "bias": self._draw(channels),
            "residual": self._draw(*self.shape),
            "grad": self._draw(*self.shape),
        }
        self.inputs = {name: value.to(self.dtype) for name, value in self.inputs.items()}
        statistics = {"mean": self._draw(features), "m2": 3 * self._draw(features).square()}
        coefficients = {"a": self._draw(features), "b": self._draw(features)}
        self.inputs |= {name: value.to(accumulation) for name, value in statistics.items()}
        self.inputs |= {name: value.to(accumulation_dtype(self.dtype)) for name, value in coefficients.items()}
        for name in ("x", "residual", "grad"):
            self.inputs[name] = self.inputs[name].contiguous(memory_format=LAYOUTS[self.layout])
        if self.count == 0:
            self.inputs["mean"].fill_(float("nan"))
            self.inputs["m2"].fill_(float("nan"))

    @staticmethod
    def _draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    def run(self, kernels: ModuleType, *, in_float64: bool = False) -> dict[str, Tensor]:
        """y, mean and m2 after `relu_moments`, and grad after `relu_moments_backward`, from copies of the inputs.

        The residual is also the gradient that comes over a shortcut.
        """
        on: dict[str, Any] = {"dtype": torch.float64} if in_float64 else {"device": self.device}
        own = {name: value.to(**on).clone(memory_format=torch.preserve_format) for name, value in self.inputs.items()}
        bias, residual = own["bias"] if self.bias else None, own["residual"] if self.residual else None
        kernels.relu_moments(own["x"], own["mean"], own["m2"], self.count, bias, residual, self.activation)
        y = own["x"].clone(memory_format=torch.preserve_format)
        kernels.relu_moments_backward(own["grad"], y, own["a"], own["b"], self.activation, residual)
        assert torch.equal(y.nan_to_num(), own["x"].nan_to_num()), "the backward pass only reads y"
        return {"y": y, "mean": own["mean"], "m2": own["m2"], "grad": own["grad"]}

    def expected(self) -> dict[str, Tensor]:
        return self.run(reference, in_float64=True)


def moments_of(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2 of activations as stored, in float64."""
    rows = feature_rows(y).double()
    m2, mean = torch.var_mean(rows, dim=0, correction=0)
    return mean, m2 * len(rows)


@dataclass
class AveragerRun:
    """Arguments of a sequence of `averager_step`, the same for whoever runs it.

    Attributes:
        rule, weight, rate, beta1, beta2, eps, correction: as of the operation.
        advances: one step for each entry.
        steps: taken before the first.
    """

    rule: str = "ama"
    weight: bool = False
    features: int = 1543
    count: int = 7
    rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    correction: int = 1
    advances: tuple[bool, ...] = (True, True, False)
    steps: int = 0
    inputs: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64).float()

        self.inputs = {"v": draw(2, self.features), "m": draw(2, self.features), "u": draw(2, self.features).square()}
        if self.steps == 0:
            self.inputs["m"].zero_()
            self.inputs["u"].zero_()
        self.inputs["weight"] = draw(self.features).abs()
        for n in range(len(self.advances)):
            self.inputs[f"mean{n}"], self.inputs[f"target_mean{n}"] = draw(self.features), draw(self.features)
            self.inputs[f"m2{n}"], self.inputs[f"target_variance{n}"] = (
                self.count * draw(self.features).square(),
                draw(self.features).square(),
            )

    def run(self, kernels: ModuleType, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
        """Every step's a, b and sums, and the state after the last step."""
        own = {name: value.to(device, dtype).clone() for name, value in self.inputs.items()}
        step = torch.tensor(self.steps, device=device)
        results: dict[str, Tensor] = {}
        for n, advance in enumerate(self.advances):
            results[f"a{n}"], results[f"b{n}"], results[f"sums{n}"] = kernels.averager_step(
                own[f"mean{n}"],
                own[f"m2{n}"],
                self.count,
                own[f"target_mean{n}"],
                own[f"target_variance{n}"],
                own["v"],
                own["m"],
                own["u"],
                step,
                rule=self.rule,
                rate=self.rate,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                correction=self.correction,
                advance=advance,
                weight=own["weight"] if self.weight else None,
            )
        return results | {name: own[name] for name in ("v", "m", "u")} | {"step": step}
