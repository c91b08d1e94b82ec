"""The rule that says when the matched distance and the judges part, and the one line that training says then."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from engine.training.held_out import WINDOW, Judgements, falls, rises
from engine.training.logbook import Logbook

DOWN, UP = [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]


def entries(matched: list[float], *judges: list[float], key: str = "loss", **more: Any) -> list[dict[str, Any]]:
    """A line before each evaluation and one at it, whose mean is the matched distance."""
    found: list[dict[str, Any]] = []
    for index, (value, *distances) in enumerate(zip(matched, *judges, strict=True), start=1):
        first, *others = [
            {"network": f"judge {number}", "kernel_distance": distance, "frechet_distance": 0.5}
            for number, distance in enumerate(distances, start=1)
        ]
        evaluation = {**first, **more, **({"others": others} if others else {})}
        rate = {"images_per_second": 9.0}
        found.append({"step": 10 * index - 5, "loss": 0.0, key: value - 0.25, **rate})
        found.append({"step": 10 * index, "loss": 0.0, key: value + 0.25, **rate, "evaluation": evaluation})
    return found


def test_rising_is_that_of_kendalls_tau() -> None:
    """SciPy's τ of five numbers is 0.8 where one pair of the ten is out of order."""
    orders = list(itertools.permutations(range(WINDOW)))
    expected = [kendalltau(range(WINDOW), order).statistic >= 0.8 - 1e-9 for order in orders]
    assert [rises([float(value) for value in order]) for order in orders] == expected
    assert [falls([-float(value) for value in order]) for order in orders] == expected
    assert sum(expected) == 5  # 4% of 120, as the docstring says


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], True),
        ([1.0, 3.0, 2.0, 4.0, 5.0], True),
        ([2.0, 3.0, 1.0, 4.0, 5.0], False),
        ([1.0, 1.0, 2.0, 3.0, 4.0], True),  # a tie is a pair that is not in order
        ([1.0, 1.0, 2.0, 2.0, 3.0], False),
        ([1.0, 2.0, 3.0, 4.0, None], False),
    ],
)
def test_one_pair_may_be_out_of_order(values: list[float | None], expected: bool) -> None:
    assert rises(values) is expected


@pytest.mark.parametrize(
    ("matched", "judges", "parted"),
    [
        (DOWN, [UP], True),
        (DOWN, [UP, UP], True),
        (DOWN, [UP, DOWN], False),
        (DOWN, [DOWN, UP], False),
        (UP, [UP, UP], False),
        (DOWN, [DOWN, DOWN], False),
        (DOWN[1:], [UP[1:]], False),
        (DOWN, [[*UP[:4], float("nan")]], False),
    ],
)
def test_they_part_where_every_judge_rises(matched: list[float], judges: list[list[float]], parted: bool) -> None:
    assert Judgements(entries(matched, *judges)).parted == ([50] if parted else [])


def test_the_matched_distance_is_the_mean_since_the_last_evaluation() -> None:
    found = Judgements(entries(DOWN, UP)).found
    np.testing.assert_allclose([one.matched for one in found], DOWN, rtol=1e-12)
    assert [one.step for one in found] == [10, 20, 30, 40, 50]


def test_the_distance_of_the_moments_goes_before_the_loss() -> None:
    """With AMA the loss is no distance; these are 0 in all lines."""
    judgements = Judgements(entries(DOWN, UP, key="difference_norm"))
    assert (judgements.matched, judgements.parted) == ("difference_norm", [50])


def test_a_network_that_is_matched_has_no_say() -> None:
    assert Judgements(entries(DOWN, DOWN, UP, is_matched=True)).parted == [50]
    assert Judgements(entries(DOWN, UP, DOWN, is_matched=True)).parted == []
    assert Judgements(entries(DOWN, UP, is_matched=True)).parted == [], "then nobody is held out"


def test_a_judge_that_came_later_is_waited_for() -> None:
    log = entries(DOWN, UP)[:4] + entries(DOWN, UP, UP)[4:]
    assert Judgements(log).parted == []


def test_what_is_no_evaluation_is_passed_over() -> None:
    log = [{"step": 1}, {"step": 2, "evaluation": 3}, {"step": 3, "loss": "x", "evaluation": {"others": 1}}]
    (found,) = Judgements(log).found
    assert (found.step, found.matched, found.held_out) == (3, None, {"None": None})


@pytest.mark.parametrize("resumed_after", [None, 8, 12], ids=["whole", "resumed before", "resumed after"])
def test_training_says_it_once_each_time(resumed_after: int | None, tmp_path: Path, caplog) -> None:
    """Six evaluations part from the fifth on; then one goes back, and five part again. A resumed run says the same."""
    falling = [float(value) for value in range(20, 8, -1)]
    rising = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    log = entries(falling, rising, rising, key="difference_norm")
    assert Judgements(log).parted == [50, 60, 110, 120]
    caplog.set_level(logging.WARNING, "gfmn")
    # As after `RunFolder.rewind`: a new logbook finds the lines of the steps before.
    for part in [log] if resumed_after is None else [log[:resumed_after], log[resumed_after:]]:
        with Logbook(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", part[0]["step"] - 1, 130) as logbook:
            for line in part:
                entry = {key: value for key, value in line.items() if key != "evaluation"}
                logbook.write(entry, line.get("evaluation"))
    said = [record.getMessage() for record in caplog.records if "over the last" in record.getMessage()]
    assert [line.split(": ")[1] for line in said] == ["step 50", "step 110"]
    assert "‖Δ‖ falls and the kernel distance by judge 1, judge 2 rises" in said[0]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == log


def test_tensorboard_names_the_other_judges(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Logbook(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0, 20) as logbook:
        line = entries([1.0], [0.25], [0.125])[-1]
        evaluation = line.pop("evaluation")
        logbook.write(line, evaluation)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("evaluation/kernel_distance")[0].value == 0.25
    assert events.Scalars("evaluation/kernel_distance[judge 2]")[0].value == 0.125
