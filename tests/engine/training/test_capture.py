"""Two consecutive steps ask the same of PyTorch, on the same memory: then a CUDA graph of one of them does them all."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from helpers.small_steps import VARIANTS, configuration, device_step, marked, small_trainer
from helpers.step_trace import StepTrace, capture_faults, differences
from torch import Tensor

from engine.comparison.games.penalties import PENALTIES
from engine.configuration.config import Config
from engine.configuration.groups import GROUPS
from engine.configuration.presets import PRESETS

# Other numbers of critic steps; labels that the host picks, and eigenvectors that it finds; half precision that a CPU
# takes long for; moments that change now and then.
NOT_CAPTURED = (
    *("gan-warmup", "improved-gan-classes", "published-mcgan-covariance", "gan-fp16", "dfm-fp16"),
    *("published-molm", "molm-spectral", "molm-bf16"),
)
# Of these steps the host knows the numbers of images.
NOT_CAPTURED += ("glo-pixels", "imle-pyramid", "imle-pixels", "imle-features", "glann-float32")


@pytest.fixture(autouse=True)
def plain_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: without oneDNN the extractor's convolutions are PyTorch's."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


def in_low_precision(config: Config) -> bool:
    return config.training.amp  # which many a CPU takes long for


@pytest.mark.parametrize("name", marked([name for name in VARIANTS if name not in NOT_CAPTURED], slow=in_low_precision))
def test_steps_can_be_captured(name: str) -> None:
    assert capture_faults(device_step(small_trainer(configuration(*VARIANTS[name])))) == []


def test_every_choice_that_a_step_depends_on_is_among_the_variants() -> None:
    """What is chosen from a list that grows belongs into `VARIANTS` too."""
    groups = ("method", "networks", "gfmn", "mmd", "critic", "game", "autoencoder", "latent")
    groups += ("matching", "training", "updates")
    elsewhere = {"kernels", "device", "float32", "layers_from", "dataset", "loader"}
    fields = [entry for name in groups for entry in dataclasses.fields(GROUPS[name]) if entry.name not in elsewhere]
    choices = {entry.name: set(entry.metadata["choices"]) for entry in fields if entry.metadata["choices"]}
    flat = [configuration(*variant).flat() for variant in VARIANTS.values()]
    assert {name: {settings[name] for settings in flat} - {None} for name in choices} == choices
    assert {name for settings in flat for name in settings["penalty"]} == set(PENALTIES)
    assert {preset for preset, _ in VARIANTS.values()} == set(PRESETS)


def whole(step: Callable[[], object]) -> Callable[[AbstractContextManager[Any]], None]:
    """For `capture_faults`: all of a step would be captured."""

    def inside(context: AbstractContextManager[Any]) -> None:
        with context:
            step()

    return inside


Planted = Callable[[Tensor], object]


def counted() -> Planted:
    steps = itertools.count()
    return lambda state: state * float(next(steps))


def rebound() -> Planted:
    kept = [torch.zeros(3)]

    def step(state: Tensor) -> None:
        kept[0] = kept[0] + state

    return step


def regrown() -> Planted:
    steps = itertools.count()
    return lambda state: state[: next(steps) % 2 + 1].exp()


def moved() -> Planted:
    steps = itertools.count()
    memory = torch.zeros(6)
    return lambda state: memory[next(steps) % 2 :][:3].add_(state)


def sometimes_more() -> Planted:
    steps = itertools.count()
    return lambda state: [state.exp() for _ in range(next(steps) % 2)]


def sometimes_another() -> Planted:
    steps = itertools.count()
    return lambda state: state.exp() if next(steps) % 2 else state.sin()


def another_in_backward() -> Planted:
    steps = itertools.count()

    def step(state: Tensor) -> None:
        leaf = state.detach().requires_grad_()
        leaf.register_hook(lambda gradient: gradient * next(steps))
        leaf.exp().sum().backward()

    return step


THIS = "tests/engine/training/test_capture.py"
PLANTED: dict[str, tuple[Callable[[], Planted], str, str]] = {
    "a number that changes": (counted, "call 0 changes: aten.mul.Tensor", "3.0), then"),
    "a rebound state": (rebound, "call 0 changes: aten.add.Tensor", "kept[0] = kept[0] + state"),
    "another size": (regrown, "changes: aten.slice.Tensor", "state[: next(steps) % 2 + 1]"),
    "another place in memory": (moved, "changes: aten.slice.Tensor", "memory[next(steps) % 2 :]"),
    "an operator more": (sometimes_more, "steps have 1 calls, then 0; only one has aten.exp.default", THIS),
    "another operator": (sometimes_another, "call 0 is aten.exp.default", "then aten.sin.default"),
    "a number in backward": (another_in_backward, "changes: aten.mul.Tensor", "(backward: "),
    "a shape that depends on values": (lambda: lambda state: state[state > 0], "returns a shape that depends on", THIS),
    "nonzero": (lambda: torch.nonzero, "aten.nonzero.default returns a shape that depends on values", THIS),
    "a value waited for": (lambda: lambda state: state.sum().item(), "_local_scalar_dense.default waits for", THIS),
    "a branch on a value": (lambda: lambda state: bool(state.any()), "waits for a value", THIS),
    "random numbers": (lambda: lambda state: torch.randn(3), "aten.randn.default draws random numbers", THIS),
    "a tensor made on the host": (
        lambda: lambda state: state + torch.tensor([1.0, 2.0, 3.0]),
        "changes: aten.lift_fresh.default",
        "torch.tensor([1.0, 2.0, 3.0])",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_lint_sees(name: str) -> None:
    make, what, where = PLANTED[name]
    planted, state = make(), torch.ones(3)
    faults = capture_faults(whole(lambda: planted(state)))
    assert any(what in fault and where in fault and THIS in fault for fault in faults), faults


@pytest.mark.parametrize("name", ["a number that changes", "a rebound state", "a value waited for"])
def test_lint_sees_it_inside_a_trainers_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small_trainer(configuration("digits", {}))
    planted, state, scalars = PLANTED[name][0](), torch.ones(3), trainer.method.objective.scalars

    def with_fault() -> dict[str, Tensor]:
        planted(state)
        return scalars()

    monkeypatch.setattr(trainer.method.objective, "scalars", with_fault)
    faults = capture_faults(device_step(trainer))
    assert [fault for fault in faults if THIS in fault]


def test_lint_is_content_with_what_a_graph_can_hold() -> None:
    """State in place, memory of the step's own, constants, views, an optimizer."""
    weight = torch.ones(4, 4, requires_grad=True)
    average = torch.zeros(4, 4)
    adam = torch.optim.Adam([weight], lr=0.1, fused=True)

    def step() -> None:
        loss = (weight @ weight.t()).relu().mul(0.5).sum()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        average.lerp_(weight.detach(), 0.1)

    assert capture_faults(whole(step)) == []


def test_without_warmup_the_optimizers_first_step_differs() -> None:
    weight = torch.ones(4, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=0.1, fused=True)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        weight.sum().backward()
        adam.step()

    assert capture_faults(whole(step), warmup=0) != []


def test_memory_is_never_used_twice_while_steps_are_compared() -> None:
    """Else a state that is rebound could come to lie where it lay before, by chance."""
    traces = StepTrace(), StepTrace()
    for trace in traces:
        with trace:
            torch.zeros(1000).exp()
    assert differences(*traces) == []
    first, second = (set(trace._held) for trace in traces)
    assert not first & second
