"""The charts of logged numbers, whatever was logged, and the tables of evaluations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.report_page import Outline, text_of, write

from engine.reporting.charts import Chart
from engine.reporting.numbers import is_number, logged_charts


def gfmn_entries(**more: float) -> list[dict[str, object]]:
    """What GFMN logs in three steps."""
    return [
        {
            "step": step,
            "loss": 3.0 / step,
            "loss_mean": 1.0 / step,
            "loss_variance": 2.0 / step,
            "difference_norm": 10.0**-step,
            "images_per_second": 50.0 + step,
            "peak_memory_bytes": 2**30,
            **more,
        }
        for step in (1, 2, 3)
    ]


def titles(charts: list[Chart]) -> list[str]:
    return [chart.title for chart in charts]


def heights(chart: Chart, line: int = 0) -> np.ndarray:
    return np.array([point.split(",")[1] for point in chart.lines[line].points.split()], dtype=float)


def test_known_series_have_their_charts() -> None:
    charts = logged_charts(gfmn_entries())
    assert titles(charts) == ["Loss", "‖Δ‖, distance of the moments to the target", "Images per second"]
    assert [line.name for line in charts[0].lines] == ["loss", "over means", "over variances"]
    assert charts[0].summary.startswith("loss from 3 at step 1 to 1 at step 3; over means from 1 at step 1")
    # Powers of ten lie on a straight line: the axis is logarithmic.
    assert np.ptp(np.diff(heights(charts[1]))) < 0.2
    assert (np.diff(heights(charts[1])) > 0).all()


def test_a_rate_is_drawn_if_it_changes() -> None:
    entries = gfmn_entries(lr=1e-4)
    assert "Learning rate" not in titles(logged_charts(entries))
    entries[-1]["lr"] = 5e-5
    assert titles(logged_charts(entries))[-1] == "Learning rate"


def test_another_methods_series_have_charts_of_their_own() -> None:
    entries = [
        {
            "step": step,
            "critic_loss": -step,
            "loss": step,
            "images_per_second": 9.0,
            "gradient_penalty": [None, 0.5, 0.25, float("nan")][step],
            "diverged": False,
            "phase": "warm-up",
            "evaluation": {"network": "resnet18", "frechet_distance": 3.0},
        }
        for step in (1, 2, 3)
    ]
    charts = logged_charts(entries)
    assert titles(charts) == ["Loss", "critic_loss", "gradient_penalty", "Images per second"]
    assert charts[1].summary == "critic_loss from −1 at step 1 to −3 at step 3"
    assert [len(heights(chart)) for chart in charts] == [3, 3, 2, 3]
    assert [line.name for line in charts[0].lines] == ["loss"]


def test_without_numbers_there_are_no_charts() -> None:
    assert logged_charts([]) == []
    assert logged_charts([{"step": 1, "loss": float("inf"), "peak_memory_bytes": 5}]) == []


@pytest.mark.parametrize(
    ("value", "expected"), [(0, True), (-1.5, True), (float("nan"), False), (float("inf"), False), (True, False)]
)
def test_what_counts_as_a_number(value: object, expected: bool) -> None:
    assert is_number(value) is expected
    assert not is_number(str(value))


def test_the_page_draws_what_another_method_logs(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {"step": row["step"], "loss": row["loss"], "mmd<2>": row["loss"] ** 2, "images_per_second": 9.0} for row in rows
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    markup = write(run)
    assert Outline(markup).mistakes == []
    losses = markup.split("<h2>Losses</h2>")[1].split("</section>")[0]
    captions = [text_of(caption) for caption in re.findall(r"<figcaption>(.*?)</figcaption>", losses, re.DOTALL)]
    assert captions == ["Loss", "mmd<2>", "Images per second"]
    assert "‖Δ‖" not in markup


def test_evaluations_on_inception_and_on_another_network(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row["lr"] = 1e-4 / (index + 1)
        row["evaluation"] = {
            "network": "efficientnet-lite0",
            "is_inception": index == 5,
            "samples": 1000,
            "frechet_distance": 12.5 - index,
            "kernel_distance": 0.0123,
            "kernel_distance_std": 0.0004,
            **({"precision": 0.5} if index < 5 else {}),
        }
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    markup = write(run)
    assert Outline(markup).mistakes == []
    one, other = markup.split("<h2>Evaluation on ")[1:]
    assert "Fréchet distance on efficientnet-lite0 features (not FID)" in one
    assert "0.01230 ± 0.00040" in one
    assert one.count("<svg") == 3
    assert "recall" not in one
    columns = [re.findall(r"<th scope=\"col\">(.*?)</th>", part) for part in (one, other)]
    assert columns[0] == ["step", "samples", "Fréchet distance (not FID)", "kernel distance (not KID)", "precision"]
    assert columns[1] == ["step", "samples", "FID", "KID"]
    assert "Learning rate" in markup
