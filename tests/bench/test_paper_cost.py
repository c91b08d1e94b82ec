"""bench.paper.cost: which of a run's steps are timed, and what is not counted."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from bench.commands import RunFailed
from bench.paper.cost import Span, seconds_per_step, timed

TINY = ["--preset", "digits", "--method", "vae", "--device", "cpu", "--batch-size", "4"]


class Run:
    """A trainer whose steps take the seconds of `costs`, the last of them again and again, by a clock of its own."""

    def __init__(self, costs: list[float], steps: int, monkeypatch: pytest.MonkeyPatch):
        self.costs, self.step, self.clock, self.checked = costs, 0, 0.0, 0
        self.schedule, self.device = SimpleNamespace(steps=steps), torch.device("cpu")
        monkeypatch.setattr(time, "process_time", lambda: self.clock)

    def train_step(self) -> None:
        self.clock += self.costs[min(self.step, len(self.costs) - 1)]
        self.step += 1

    def check_finite(self) -> None:
        self.checked += 1


def test_first_steps_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run([9.0, 9.0, 1.0, 3.0, 9.0], 100, monkeypatch)
    assert timed(run, [Span(2, 2)]) == [2.0]  # type: ignore[arg-type]
    assert run.step == 4
    assert run.checked >= 4


def test_every_stage_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run([9.0, 1.0, 1.0, 9.0, 5.0], 6, monkeypatch)
    assert timed(run, [Span(1, 2), Span(1, 2)]) == [1.0, 5.0]  # type: ignore[arg-type]
    assert run.step == 6


def test_cheap_steps_are_counted_over_more_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run([9.0, 0.25], 100, monkeypatch)
    assert timed(run, [Span(1, 3)]) == [0.25]  # type: ignore[arg-type]
    assert run.step == 1 + 9  # the first multiple of three that takes two seconds
    short = Run([9.0, 0.25], 6, monkeypatch)
    assert timed(short, [Span(1, 3)]) == [0.25]  # type: ignore[arg-type]
    assert short.step == 4  # it has no room for three more


def test_a_run_is_timed_in_a_process_of_its_own(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    begun = time.perf_counter()
    (seconds,) = seconds_per_step([*TINY, "--steps", "3"], [Span(1, 2)], threads=1)
    assert 0 < seconds < time.perf_counter() - begun
    assert "--steps 3: what a step costs" in capfd.readouterr().err


def test_a_run_that_cannot_begin_says_why() -> None:
    with pytest.raises(RunFailed, match=r"engine.train .* failed: error: --batch-size: a step needs .* GiB"):
        seconds_per_step([*TINY, "--steps", "3", "--batch-size", "100000"], [Span(1, 2)], threads=1)
