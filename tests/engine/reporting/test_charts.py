"""Lines, ticks and labels of the charts."""

from __future__ import annotations

import numpy as np
import pytest

from engine.reporting.charts import HEIGHT, WIDTH, line_chart, log_ticks, number, ticks


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 900) == [0, 200, 400, 600, 800]
    assert ticks(-0.3, 0.31) == [-0.2, 0, 0.2]
    assert log_ticks(0.5, 2.1) == [5, 10, 20, 50, 100]
    assert log_ticks(-3, 12)[0] == 1e-3
    assert 2 <= len(log_ticks(1.31, 1.39)) <= 4


def test_numbers_read_well() -> None:
    assert [number(value) for value in (0, 12000, -3, 0.03125, 1.2e-5, 12345.6, 3.0e9)] == [
        "0", "12,000", "−3", "0.0312", "1.2e−5", "12,346", "3e9",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 1.0], [1e-9, 1e9], list(range(1, 5000))])
@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_lines_lie_inside_the_chart(values: list[float], log: bool) -> None:
    chart = line_chart("a", {"": list(enumerate(values, 1))}, log=log)
    if log and not any(value > 0 for value in values):
        assert chart is None
        return
    assert chart is not None
    points = np.array([point.split(",") for point in chart.lines[0].points.split()], dtype=float)
    assert len(points) <= 800
    assert (points >= 0).all()
    assert (points <= [WIDTH, HEIGHT]).all()
    assert 1 <= len(chart.y_ticks) <= 7
