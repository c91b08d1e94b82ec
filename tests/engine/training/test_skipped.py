"""Steps with a gradient that is not finite: counted, and too many in a row end the run."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from helpers.runs import command, same_run

from engine import train
from engine.methods.gradient_step import GradientStep
from engine.training.skipped import SkippedSteps

pytestmark = pytest.mark.usefixtures("own_cache")


def test_counts_are_those_of_the_sequence() -> None:
    draw = random.Random(4)
    sequence = [draw.random() < 0.6 for _ in range(60)]
    counted, begin = SkippedSteps(torch.device("cpu"), most=3), 0
    for length, one in enumerate(sequence, start=1):
        counted.take_in(torch.tensor(float(one)))
        runs = [len(list(group)) for value, group in itertools.groupby(sequence[begin:length]) if value]
        row = runs[-1] if one else 0
        assert (int(counted.total), int(counted.row)) == (sum(sequence[:length]), row)
        assert counted.too_many() == (row if row > 3 else 0)
        if length == 30:
            again = SkippedSteps(torch.device("cpu"), most=3)
            again.load_state_dict(counted.state_dict())
            counted, begin = again, length - row


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps whose gradient is NaN although the loss is finite; the set is empty at first."""
    steps: set[int] = set()
    make = GradientStep.__init__

    def made(self: GradientStep, module: torch.nn.Module, **options: object) -> None:
        make(self, module, **options)  # type: ignore[arg-type]
        taken = itertools.count(1)
        weight = next(iter(module.parameters()))
        weight.register_hook(lambda gradient: gradient * float("nan") if next(taken) in steps else gradient)

    monkeypatch.setattr(GradientStep, "__init__", made)
    return steps


def test_a_run_goes_on_without_the_step(poisoned: set[int], flags: list[str], tmp_path: Path) -> None:
    poisoned |= {2, 3, 5}
    argv = [*flags, "--max-skipped", "2", "--generator-ema", "0.5"]
    train.main([*argv, "--out", str(tmp_path / "whole")])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 2, 2, 3, 3]
    # Resumed in a row of them, which goes on.
    train.main([*argv, "--steps", "2", "--out", str(tmp_path / "parts")])
    poisoned.clear()
    poisoned |= {1, 3}
    train.main(["--resume", "--steps", "6", "--out", str(tmp_path / "parts")])
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    checkpoints = [tmp_path / run / "checkpoints" / "step_00000006.safetensors" for run in ("whole", "parts")]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()


def test_too_many_in_a_row_end_it(poisoned: set[int], flags: list[str], tmp_path: Path, capsys) -> None:
    poisoned |= {1, 3, 4, 5}
    code, errors = command(train.main, [*flags, "--max-skipped", "2", "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    line = errors.splitlines()[-1]
    assert "the gradient, 3 times in a row, became NaN or infinite at step 5" in line
    assert "the last good checkpoint is " in line
    assert "step_00000004.safetensors" in line


def test_a_loss_that_is_not_finite_ends_it_at_once(flags: list[str], tmp_path: Path, capsys) -> None:
    code, errors = command(
        train.main, [*flags, "--lr", "1e30", "--max-skipped", "1000", "--steps", "50", "--out", str(tmp_path)], capsys
    )
    assert code == 2
    assert "the loss became NaN or infinite" in errors.splitlines()[-1]
