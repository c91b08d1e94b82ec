"""Rates over a run, against `torch.optim.lr_scheduler`."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

from engine.training.rates import Rates, RateSchedule

BASE, STEPS, WARMUP = 0.3, 37, 5


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)


def rates_of(scheduler: lr_scheduler.LRScheduler, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_is_torchs_schedule_after_a_warm_up(decay: str, warmup: int, final: float) -> None:
    """HuggingFace's `get_cosine_schedule_with_warmup` and its kin: from 0, and the whole rate after `warmup` steps."""
    final = 0.0 if decay == "constant" else final
    schedule = RateSchedule(decay=decay, warmup=warmup, final=final, steps=STEPS)
    rising = rates_of(lr_scheduler.LambdaLR(optimizer(), lambda step: step / WARMUP), warmup)
    left = STEPS - warmup
    falling = {
        "constant": lambda: lr_scheduler.LambdaLR(optimizer(), lambda step: 1.0),
        "linear": lambda: lr_scheduler.LinearLR(optimizer(), 1.0, final, total_iters=left),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer(), left, eta_min=final * BASE),
    }[decay]()
    expected = rising + rates_of(falling, left + 1)
    assert [BASE * schedule.share(step) for step in range(STEPS + 1)] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert schedule.varies == (decay != "constant" or warmup > 0)


def test_what_comes_after_the_last_step_stays() -> None:
    schedule = RateSchedule(decay="cosine", final=0.25, steps=10)
    assert schedule.share(10) == schedule.share(1000) == 0.25


def test_a_rate_that_varies_lies_in_one_place() -> None:
    one = optimizer()
    rates = Rates({"generator": one}, RateSchedule(decay="linear", steps=10))
    place = one.param_groups[0]["lr"]
    for step in (0, 3, 7):
        assert not rates.give(step), "no number of Python's"
        assert one.param_groups[0]["lr"] is place
        assert float(place) == rates.of("generator", step) == pytest.approx(BASE * (1 - step / 10), rel=1e-15)


def test_a_factor_holds_for_all_further_steps() -> None:
    one, two = optimizer(), optimizer()
    schedule = RateSchedule(decay="cosine", warmup=2, final=0.1, steps=10)
    rates, again = Rates({"generator": one}, schedule), Rates({"generator": two}, schedule)
    rates.scale(0.8)
    rates.scale(0.5)
    again.load_state_dict(rates.state_dict())
    for step in range(11):
        rates.give(step)
        again.give(step)
        expected = 0.4 * BASE * schedule.share(step)
        assert float(one.param_groups[0]["lr"]) == pytest.approx(expected, rel=1e-15)
        assert float(two.param_groups[0]["lr"]) == float(one.param_groups[0]["lr"])


def test_a_constant_rate_is_pythons_and_says_when_it_changes() -> None:
    one = optimizer()
    rates = Rates({"generator": one})
    assert not rates.give(0)
    assert one.param_groups[0]["lr"] == BASE
    assert isinstance(one.param_groups[0]["lr"], float)
    rates.scale(0.5)
    assert rates.give(1)
    assert not rates.give(2)
    assert one.param_groups[0]["lr"] == 0.5 * BASE
