"""The operators `gfmn::*`: schemas, fakes, torch.compile, argument checks, and the choice of a backend."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch
from cases import MODULES, Activations, AveragerRun, backend, device_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

import kernels
from kernels import compiled, reference

OPERATIONS = ("relu_moments", "relu_moments_backward", "dataset_moments", "averager_step")
HYPERPARAMETERS: dict[str, Any] = {
    "rule": "ama", "rate": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "correction": 1, "advance": True,
}  # fmt: skip


def arguments(operation: str, device: str = "cpu") -> tuple[list[Any], dict[str, Any]]:
    case = Activations((4, 3, 5, 5), bias=True, residual=True, count=2)
    own = {name: value.to(device) for name, value in case.inputs.items()}
    if operation == "relu_moments":
        return [own["x"], own["mean"], own["m2"], 2, own["bias"], own["residual"], "relu6"], {}
    if operation == "relu_moments_backward":
        return [own["grad"], own["x"], own["a"], own["b"], "relu", own["residual"]], {}
    if operation == "dataset_moments":
        return [own["x"], own["mean"].double(), own["m2"].double(), 2, own["bias"], own["residual"], "relu", 50], {}
    run = {name: value.to(device) for name, value in AveragerRun(features=75).inputs.items()}
    step = torch.zeros((), dtype=torch.int64, device=device)
    names = ("target_mean0", "target_variance0", "v", "m", "u")
    values: list[Any] = [run["mean0"], run["m20"], 7, *(run[name] for name in names), step]
    return values, {**HYPERPARAMETERS, "weight": run["weight"]}


def overload(operation: str, name: str) -> Any:
    backend(name)
    return getattr(getattr(torch.ops.gfmn, operation), name)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation: str, name: str) -> None:
    args, kwargs = arguments(operation, device_of(name))
    results = torch.library.opcheck(overload(operation, name), tuple(args), kwargs)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_pass_through(device: str, name: str) -> None:
    """Shapes and dtypes without a computation, and without a device: the fakes of "cuda" need none."""
    args, kwargs = arguments("averager_step")
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x).to(device) if isinstance(x, Tensor) else x for x in args]
        kwargs["weight"] = mode.from_tensor(kwargs["weight"]).to(device)
        a, b, sums = backend(name).averager_step(*fakes, **kwargs)
        assert backend(name).relu_moments(torch.empty(2, 3, 5, 5, device=device), fakes[0], fakes[1], 0) is None
    assert (a.shape, b.dtype, sums.shape, sums.dtype) == ((75,), torch.float32, (6,), torch.float64)
    assert {x.device.type for x in (a, b, sums)} == {device}


@pytest.mark.parametrize("name", MODULES)
def test_torch_compile_passes_through(name: str) -> None:
    """One graph around an operator, with another number of images each time: nothing breaks, nothing is lost."""
    kernels = backend(name)

    def step(x: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
        kernels.relu_moments(x, mean, m2, 0)
        return x * 2 + mean.view(3, 2, 2)

    compiled_step = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for images in (3, 5):
        x = torch.randn(images, 3, 2, 2, device=device_of(name))
        own = x.clone()
        statistics = [torch.empty(12, device=x.device) for _ in range(4)]
        expected = step(own, *statistics[:2])
        assert torch.equal(compiled_step(x, *statistics[2:]), expected)
        assert torch.equal(x, own)
        assert torch.equal(statistics[2], statistics[0])


BAD_ARGUMENTS = {
    "activation": ("relu_moments", {6: "gelu"}),
    "x": ("relu_moments", {0: torch.zeros(4, 75)}),
    "x, dtype": ("relu_moments", {0: torch.zeros(4, 3, 5, 5, dtype=torch.int32)}),
    "x, no images": ("relu_moments", {0: torch.zeros(0, 3, 5, 5)}),
    "x, strided": ("relu_moments", {0: torch.zeros(4, 3, 5, 10)[..., ::2]}),
    "x, with a graph": ("relu_moments", {0: torch.zeros(4, 3, 5, 5, requires_grad=True)}),
    "mean": ("relu_moments", {1: torch.zeros(74)}),
    "mean, dtype": ("relu_moments", {1: torch.zeros(75, dtype=torch.bfloat16)}),
    "m2": ("relu_moments", {2: torch.zeros(75, dtype=torch.float64)}),
    "m2, strided": ("relu_moments", {2: torch.zeros(150)[::2]}),
    "count": ("relu_moments", {3: -1}),
    "bias": ("relu_moments", {4: torch.zeros(5)}),
    "residual": ("relu_moments", {5: torch.zeros(4, 3, 5, 5)}),
    "residual, dtype": ("relu_moments", {5: torch.zeros(4, 3, 5, 5, dtype=torch.float16)}),
    "grad": ("relu_moments_backward", {0: torch.zeros(4, 3, 5)}),
    "y": ("relu_moments_backward", {1: torch.zeros(3, 3, 5, 5)}),
    "shortcut": ("relu_moments_backward", {5: torch.zeros(4, 3, 5, 5)}),
    "y, layout": ("relu_moments_backward", {1: torch.zeros(4, 3, 5, 5)}),
    "a": ("relu_moments_backward", {2: torch.zeros(75, dtype=torch.float64)}),
    "b": ("relu_moments_backward", {3: torch.zeros(3)}),
    "mean, narrow": ("dataset_moments", {1: torch.zeros(75)}),
    "m2, narrow": ("dataset_moments", {2: torch.zeros(75)}),
    "bias, of a dataset": ("dataset_moments", {4: torch.zeros(5)}),
    "mean ": ("averager_step", {0: torch.zeros(75, dtype=torch.float16)}),
    "target_mean": ("averager_step", {3: torch.zeros(76)}),
    "count ": ("averager_step", {2: 1}),
    "v": ("averager_step", {5: torch.zeros(75)}),
    "u": ("averager_step", {7: torch.zeros(2, 0)}),
    "step": ("averager_step", {8: torch.zeros(())}),
    "rule": ("averager_step", {"rule": "mean"}),
    "weight": ("averager_step", {"weight": torch.zeros(2, 75)}),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_a_bad_argument_is_named(what: str, name: str) -> None:
    operation, changes = BAD_ARGUMENTS[what]
    args, kwargs = arguments(operation)
    for key, value in changes.items():
        if isinstance(key, int):
            args[key] = value
        else:
            kwargs[key] = value
    before = [x.clone() if isinstance(x, Tensor) else x for x in args]
    with pytest.raises(ValueError, match=f"^{what.split(',')[0].strip()}: "):
        getattr(backend(name), operation)(*args, **kwargs)
    for old, new in zip(before, args, strict=True):
        assert not isinstance(old, Tensor) or torch.equal(old, new), "nothing may have been changed"


class TestSelect:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def test_auto_is_the_fastest_that_runs(self) -> None:
        assert kernels.select("auto", self.cpu, torch.float32) is compiled
        assert kernels.select("auto", self.cuda, torch.bfloat16) is backend("triton")
        assert kernels.select("auto", torch.device("meta"), torch.float32) is reference

    @pytest.mark.parametrize("name", MODULES)
    def test_by_name(self, name: str) -> None:
        assert kernels.select(name, torch.device(device_of(name)), torch.float32) is backend(name)

    def test_compiled_is_for_cpus(self) -> None:
        with pytest.raises(ValueError, match=r"^kernels: the compiled backend cannot run here: .*CPUs") as error:
            kernels.select("compiled", self.cuda, torch.float32)
        assert "\n" not in str(error.value)

    def test_triton_is_tried_before_it_is_chosen(self, monkeypatch) -> None:
        """Without a C compiler (slim containers) Triton fails at its first launch, and without an assembler that knows
        the GPU with an error of its own."""
        errors: list[Exception] = [
            RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable."),
            importlib.import_module("triton.runtime.errors").PTXASError("Value 'sm_130' is not defined"),
        ]

        def launch(*arguments: object) -> None:
            raise errors.pop(0)

        tried = kernels._why_triton_fails.__wrapped__
        device = torch.device(device_of("triton"))
        assert tried(device) is None
        monkeypatch.setattr(backend("triton"), "relu_moments", launch)
        assert tried(device) == "Failed to find C compiler. Please specify via CC environment variable."
        assert tried(device) == "PTXAS error: Value 'sm_130' is not defined"

    def test_auto_without_triton_on_a_gpu_says_so_once(self, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
        kernels._warn_once.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(kernels, "_why_triton_fails", lambda device: "no C compiler")
        assert [kernels.select("auto", self.cuda, torch.float32) for _ in range(2)] == [reference, reference]
        assert caplog.text.count("no C compiler") == 1
        with pytest.raises(ValueError, match="no C compiler"):
            kernels.select("triton", self.cuda, torch.float32)

    def test_an_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"^kernels: 'fast' is not one of auto, reference, compiled, triton$"):
            kernels.select("fast", self.cpu, torch.float32)

    def test_triton_on_a_cpu_needs_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match=r"needs a CUDA device, not cpu .*TRITON_INTERPRET=1") as error:
            kernels.select("triton", self.cpu, torch.float32)
        assert "\n" not in str(error.value)

    def test_auto_without_a_compiler_says_so_once(self, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        kernels._why_not_compiled.cache_clear()
        try:
            with caplog.at_level(logging.WARNING, logger="gfmn"):
                for _ in range(2):
                    assert kernels.select("auto", self.cpu, torch.float32) is reference
            assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
            assert "no-such-compiler" in caplog.text
            with pytest.raises(ValueError, match=r"^kernels: the compiled backend cannot run here: no C\+\+ compiler"):
                kernels.select("compiled", self.cpu, torch.float32)
        finally:
            kernels._why_not_compiled.cache_clear()
