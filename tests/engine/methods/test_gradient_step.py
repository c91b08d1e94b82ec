"""From a loss to new weights, against torch's own optimizers and clipping, in float64 and one parameter at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.thread_ranks import on_ranks
from torch import Tensor, nn

from engine.methods.gradient_step import GradientStep
from engine.training.ranks import ALONE, Ranks

STEPS = 6
RATES: dict[str, Any] = {"lr": 1e-2, "betas": (0.4, 0.9)}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def loss_of(module: nn.Module, step: int, factor: float | Tensor = 1.0) -> Tensor:
    """Another one at every step, with gradients of a norm about 1."""
    weight = next(module.parameters())
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(step)).to(weight)
    return (module(x) - step).square().mean() * factor


def plain(
    module: nn.Module, steps: list[int], name: str = "adam", clip_grad: float | None = None, **options: Any
) -> None:
    if name == "rmsprop":
        optimizer: torch.optim.Optimizer = torch.optim.RMSprop(module.parameters(), RATES["lr"], foreach=False)
    else:
        make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        optimizer = make(module.parameters(), **RATES, **options, foreach=False, fused=False)
    for step in steps:
        optimizer.zero_grad()
        loss_of(module, step).backward()
        if clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip_grad, foreach=False)
        optimizer.step()


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"optimizer": "adamw"}, {"name": "adamw"}),
        ({"optimizer": "adamw", "weight_decay": 0.3}, {"name": "adamw", "weight_decay": 0.3}),
        ({"optimizer": "rmsprop", "clip_grad": 0.05}, {"name": "rmsprop", "clip_grad": 0.05}),
        ({"clip_grad": 0.05}, {"clip_grad": 0.05}),
        ({"clip_grad": 2.0, "optimizer": "adamw"}, {"clip_grad": 2.0, "name": "adamw"}),
    ],
    ids=str,
)
def test_is_torchs_step(options: dict[str, Any], expected: dict[str, Any]) -> None:
    module, reference, other = network(), network(), network()
    update = GradientStep(module, **RATES, **options)
    for step in range(STEPS):
        assert update.take(loss_of(module, step)) == 0
    plain(reference, list(range(STEPS)), **expected)
    assert difference(module, reference) < 1e-13
    if expected:
        plain(other, list(range(STEPS)))
        assert difference(module, other) > 1e-6, "it matters"


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_a_scaled_loss_makes_no_difference_to_steps_and_clipping(name: str, clip: float | None) -> None:
    """The norm is that of the gradients without the loss's scale, 65536 at first."""
    module, reference = network(torch.float32), network(torch.float32)
    update = GradientStep(module, **RATES, clip_grad=clip, scaled=True, optimizer=name)
    assert update.scaler.get_scale() == 65536
    for step in range(STEPS):
        assert update.take(loss_of(module, step)) == 0
    plain(reference, list(range(STEPS)), name, clip_grad=clip)
    assert difference(module, reference) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "options", [{}, {"clip_grad": 0.05}, {"optimizer": "adamw"}, {"optimizer": "rmsprop"}], ids=str
)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(bad: float, options: dict[str, Any]) -> None:
    """One number of one gradient is enough. Neither weights, nor moments, nor Adam's count of steps move."""
    module, reference = network(), network()
    poisoned, (first, *_) = [False], module.parameters()

    def poison(gradient: Tensor) -> Tensor:
        return gradient.index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(bad).double())

    first.register_hook(lambda gradient: poison(gradient) if poisoned[0] else gradient)
    update, found = GradientStep(module, **RATES, **options), []
    for step in range(STEPS):
        poisoned[0] = step in (0, 3)
        found.append(float(update.take(loss_of(module, step))))
    assert found == [1, 0, 0, 1, 0, 0]
    named = {"name": options["optimizer"]} if "optimizer" in options else options
    plain(reference, [1, 2, 4, 5], **named)
    assert difference(module, reference) < 1e-13
    assert {float(state.get("step", 4)) for state in update.optimizer.state.values()} == {4}


def test_an_overflow_of_the_scaled_loss_is_skipped_and_lowers_the_scale() -> None:
    module = network(torch.float32)
    update = GradientStep(module, **RATES, scaled=True)
    before = [weight.detach().clone() for weight in module.parameters()]
    assert update.take(loss_of(module, 0, 1e36)) == 1
    assert update.scaler.get_scale() == 32768
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    again = GradientStep(network(torch.float32), **RATES, scaled=True)
    rest = again.load_state_dict({**update.state_dict(), "v": torch.ones(1)})
    assert list(rest) == ["v"]
    assert again.scaler.get_scale() == 32768


def test_weight_decay_is_adamws() -> None:
    with pytest.raises(ValueError, match="weight_decay: is adamw's"):
        GradientStep(network(), lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("size", [1, 2])
def test_a_leaf_that_overflows_lowers_the_scale(size: int) -> None:
    """On whichever rank: the weights' gradients are finite, and a scale that stayed would overflow for ever."""

    def run(ranks: Ranks = ALONE) -> tuple[float, list[float], Tensor]:
        module = network(torch.float32)
        update = GradientStep(module, **RATES, scaled=True, ranks=ranks)
        skipped = []
        for step in range(3):
            leaf = torch.zeros(2, requires_grad=True)
            steep = 1e34 if ranks.rank == ranks.size - 1 else 1.0  # float32 holds it 2^15 times
            skipped.append(float(update.take(loss_of(module, step) / size + (steep * leaf).sum(), leaf=leaf)))
        return update.scaler.get_scale(), skipped, module[0].weight.detach()

    plainly = network(torch.float32)
    plain(plainly, [1, 2])
    for scale, skipped, weight in [run()] if size == 1 else on_ranks(size, run):
        assert (scale, skipped) == (2.0**15, [1, 0, 0])
        torch.testing.assert_close(weight, plainly[0].weight.detach(), rtol=1e-4, atol=1e-5)
