"""A step on CUDA never makes the host wait, and can be captured: shown on fake CUDA tensors, which need no device."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.host_waits import fake_cuda, fake_cuda_trainer, host_waits, run_backward
from helpers.small_steps import VARIANTS, configuration, device_step, marked, small_trainer
from helpers.step_trace import capture_faults
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

WARMUP = 3
THIS = "tests/engine/training/test_host_sync.py"


@pytest.mark.parametrize("name", marked([name for name in VARIANTS if configuration(*VARIANTS[name]).needs.captured]))
def test_no_step_waits_and_all_are_the_same(name: str) -> None:
    """What `test_capture.py` shows on a CPU, with what is on the GPU alone: z's copies, rates in tensors."""
    config, changes = configuration(*VARIANTS[name]), []

    def make() -> Callable[[], object]:
        step = device_step(fake_cuda_trainer(config))
        calls = itertools.count()

        def warmed_up() -> None:
            if next(calls) < WARMUP:
                step(contextlib.nullcontext())
            else:
                changes.extend(capture_faults(step, warmup=0))

        return warmed_up

    assert host_waits(make, WARMUP) == []
    assert changes == []


def test_a_number_that_changes_on_the_host_is_seen() -> None:
    """It has the same place in every step, so that a CPU's trace does not show it; a graph would keep its value."""
    changes: list[str] = []

    def make() -> Callable[[], object]:
        x, counter = on_cuda(), torch.zeros(())

        def step(context: contextlib.AbstractContextManager[Any]) -> None:
            counter.add_(1)
            with context:
                x.mul_(counter)

        return lambda: changes.extend(capture_faults(step))

    assert host_waits(make) == []
    assert all(fault.startswith("aten.mul_.Tensor goes between host and device") for fault in changes)
    assert len(changes) == 1


def test_steps_are_on_the_device() -> None:
    """Otherwise nothing would be looked at: networks, gradients, averager, moments and loss are all there."""
    found = {}

    def step() -> Callable[[], object]:
        trainer = fake_cuda_trainer(configuration("digits", {}))
        found["trainer"] = trainer
        return lambda: found.update(trainer.train_step())

    host_waits(step, WARMUP)
    trainer = found.pop("trainer")
    assert {value.device.type for value in found.values()} == {"cuda"}
    assert {value.device.type for value in trainer.method.objective.state_dict().values()} == {"cuda"}
    gradients = [parameter.grad for parameter in trainer.method.generator.parameters()]
    assert all(gradient is not None and gradient.device.type == "cuda" for gradient in gradients)


def on_cuda() -> Tensor:
    return torch.ones(4, device="cuda")


class Peeking(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * gradient.sum().item()


Step = Callable[[Tensor], object]
WAITING: dict[str, tuple[Step, str]] = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense.default waits for a value"),
    "branch": (lambda x: 1 if x.any() else 2, "waits for a value"),
    "equal": (lambda x: torch.equal(x, x + 1), "aten.equal.default waits for a value"),
    "nonzero": (lambda x: x.nonzero(), "aten.nonzero.default"),
    "mask": (lambda x: x[x > 0], "aten.nonzero.default"),
    "masked_select": (lambda x: x.masked_select(x > 0), "aten.masked_select.default"),
    "to the host": (lambda x: x.cpu(), "copies from the device to the host"),
    "to the host, not blocking": (lambda x: x.to("cpu", non_blocking=True), "copies from the device to the host"),
    "unpinned": (
        lambda x: torch.zeros(4).to("cuda", non_blocking=True),
        "copies to the device from memory that is not page-locked",
    ),
    "unpinned copy_": (lambda x: x.copy_(torch.zeros(4), non_blocking=True), "not page-locked"),
    "unpinned foreach": (lambda x: torch._foreach_copy_([x, x], [x, torch.zeros(4)]), "not page-locked"),
    "blocking": (lambda x: x.copy_(torch.zeros(4).pin_memory()), "copies to the device and waits"),
    "made on the host": (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda"), "not page-locked"),
    "an index on the host": (lambda x: x[torch.tensor([0, 2])], "has tensors of host and device"),
    "item in backward": (
        lambda x: Peeking.apply(x.detach().requires_grad_()).sum().backward(),
        "_local_scalar_dense.default waits for a value",
    ),
    "a counter on the host": (lambda x: torch.tensor(3).to("cuda"), "not page-locked"),
}


@pytest.mark.parametrize("name", WAITING)
def test_lint_sees(name: str) -> None:
    step, what = WAITING[name]

    def planted() -> Callable[[], object]:
        x = on_cuda()
        return lambda: step(x)

    faults = host_waits(planted)
    assert any(what in fault and THIS in fault for fault in faults), faults


GOING_ON: dict[str, Step] = {
    "arithmetic": lambda x: (x * 2).exp().sum(),
    "a number on the host": lambda x: x * torch.tensor(2.0),
    "page-locked": lambda x: x.copy_(torch.zeros(4).pin_memory(), non_blocking=True),
    "made page-locked": lambda x: torch.empty(4, pin_memory=True).to("cuda", non_blocking=True),
    "filled on the device": lambda x: torch.full((3,), 2.0, device="cuda"),
    "on the host alone": lambda x: torch.zeros(3) + torch.ones(3),
}


@pytest.mark.parametrize("name", GOING_ON)
def test_lint_is_content_with(name: str) -> None:
    step = GOING_ON[name]

    def planted() -> Callable[[], object]:
        x = on_cuda()
        return lambda: step(x)

    assert host_waits(planted) == []


def test_operators_on_host_and_device_are_refused() -> None:
    """Fake tensors raise as real ones do."""
    with pytest.raises(RuntimeError, match="at least two devices"):
        host_waits(lambda: lambda: on_cuda() + torch.ones(4))


def test_synchronisation_is_refused() -> None:
    with pytest.raises(AssertionError, match="the host waits"):
        host_waits(lambda: torch.cuda.synchronize)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_lint_sees_pytorchs_average_in_a_trainers_step() -> None:
    """`AveragedModel` copies its counter to the device for every group of weights, in every step."""

    def step() -> Callable[[], object]:
        trainer = fake_cuda_trainer(configuration("digits", {}))
        generator = trainer.method.sampler().generator
        average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

        def both() -> None:
            trainer.train_step()
            average.update_parameters(generator)

        return both

    faults = host_waits(step, WARMUP)
    assert any("not page-locked" in fault for fault in faults), faults


def test_lint_sees_it_inside_a_trainers_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> Callable[[], object]:
        trainer = fake_cuda_trainer(configuration("digits", {}))
        objective: Any = trainer.method.objective
        scalars = objective.scalars
        monkeypatch.setattr(objective, "scalars", lambda: {name: value.cpu() for name, value in scalars().items()})
        return trainer.train_step

    faults = host_waits(step, WARMUP)
    assert faults
    assert all("from the device to the host" in fault and THIS in fault for fault in faults), faults


@pytest.mark.parametrize("name", ["gfmn-float32", "gfmn-uneven-chunks", "gfmn-everything-recomputed", "mmd-float32"])
def test_the_engine_in_python_gives_autograds_gradients(name: str) -> None:
    config = configuration(*VARIANTS[name])
    expected, found = small_trainer(config), small_trainer(config)
    expected.train_step()
    with fake_cuda():
        found.train_step()
    for one, other in zip(expected.method.generator.parameters(), found.method.generator.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
        torch.testing.assert_close(other, one)


def test_the_engine_in_python_sums_over_paths_and_expansions() -> None:
    x, w = torch.randn(3, 1, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    y = x * w
    loss = (y.exp() + y.sin() * x).sum() + checkpoint(torch.cos, x, use_reentrant=False).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (found,) = run_backward((loss,), (torch.ones_like(loss),), True, False, (x,))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (of_middle,) = run_backward((loss,), (torch.ones_like(loss),), True, False, (y,))
    torch.testing.assert_close(of_middle, torch.autograd.grad(loss, y)[0], rtol=1e-12, atol=0)
