"""The operators that a step dispatches on CUDA: their number may only fall, and they are counted rightly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import dispatches as bench_dispatches
from bench.dispatches import Dispatch, DispatchCounter, configuration, dispatches, print_dispatches, rows
from engine.comparison.moment_matching import MomentMatching

RECORDED = {"cifar10": 205, "digits": 102}
"""Preset → operators of a step with --amp, minibatch 64. Lower them when a step needs fewer; never raise them.

Five of them came with the skipping of steps whose gradient is not finite: the check, its result, the optimizer's count
taken back, and two numbers counted. Eleven of the digits' came with the second network that their preset matches.
"""


@pytest.mark.parametrize("preset", RECORDED)
def test_dispatches_are_within_the_budget(preset: str) -> None:
    found = dispatches(configuration(preset, None, 64, "bf16"))
    print_dispatches(rows(found))  # shown if there are too many
    assert 0 < len(found) <= RECORDED[preset]


def test_extractors_decide_convolutions_and_taps() -> None:
    """VGG19 has 16 convolutions, each with a tap; the DCGAN generator 4 that are not frozen and a linear layer."""
    steps = dispatches(configuration("cifar10", "vgg19", 64, "none"))
    both_ways = Counter((entry.operator, entry.part, entry.backward) for entry in steps)
    for backward in (False, True):  # backward of a frozen convolution is a transposed one
        assert both_ways["aten.convolution.default", "extractor", backward] == 16
    found = Counter((entry.operator, entry.part) for entry in steps)
    assert found["aten.convolution_backward.default", "generator"] == 5
    assert found["gfmn.relu_moments.triton", "criterion"] == 16
    assert found["gfmn.averager_step.triton", "criterion"] == 1
    assert found["aten._fused_adam_.default", "optimizer"] == 1


def test_one_operator_more_is_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration("digits", None, 8, "none")
    before = Counter(dispatches(config))
    scalars = MomentMatching.scalars

    def longer(self: MomentMatching) -> dict[str, Tensor]:
        return {name: value.sin() for name, value in scalars(self).items()}

    monkeypatch.setattr(MomentMatching, "scalars", longer)
    more = Counter(dispatches(config)) - before
    assert [(entry.operator, count) for entry, count in more.items()] == [("aten.sin.default", 3)]


def test_counter_tells_views_and_backward_apart() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    with DispatchCounter() as counter:
        weight.detach()  # not counted
        weight.t().exp().sum().backward()
    found = [(entry.operator, entry.view, entry.backward) for entry in counter.dispatches]
    assert found[:4] == [
        ("aten.t.default", True, False),
        ("aten.exp.default", False, False),
        ("aten.sum.default", False, False),
        ("aten.ones_like.default", False, False),
    ]
    assert ("aten.mul.Tensor", False, True) in found[4:]
    assert all(backward for *_, backward in found[4:])


def test_rows_hold_every_call() -> None:
    calls = [Dispatch("aten.mm.default", "generator", backward, False) for backward in (False, True, True)]
    (row,) = rows(calls)
    assert (row.operator, row.part, row.forward, row.backward, row.view) == (
        "aten.mm.default",
        "generator",
        1,
        2,
        False,
    )


def test_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    bench_dispatches.main(["--preset", "digits", "--batch-size", "4", "--json", str(file)])
    printed = capsys.readouterr().out
    written: list[dict[str, Any]] = json.loads(file.read_text())
    total = sum(row["forward"] + row["backward"] for row in written)
    views = sum(row["forward"] + row["backward"] for row in written if row["view"])
    assert f"{total} operators, {views} of them views" in printed
    assert "| gfmn.averager_step.triton |" in printed
