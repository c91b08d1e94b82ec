"""The plot of a run's metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from engine.training.logbook import plot_metrics


def test_the_plot_has_every_series_over_the_steps_that_logged_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of gmmn-ae, whose second phase has another loss, and as a critic's, which learns in some steps alone."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    shared = {"images_per_second": 50.0, "peak_memory_bytes": 2**30, "lr": 1e-3}
    metrics = [
        {"step": 1, "loss": 4.0, "reconstruction": 3.0, **shared},
        {"step": 2, "loss": 2.0, "reconstruction": 1.0, "critic_loss": 0.5, "evaluation": {"kid": 1.0}, **shared},
        {"step": 3, "loss": 1.0, "difference_norm": 0.1, **shared},
        {"step": 4, "loss": 0.5, "difference_norm": 0.2, "critic_loss": 0.25, "skipped_steps": 1, **shared},
    ]
    assert plot_metrics(tmp_path / "loss.png", metrics)
    losses, norm = figures[0].axes
    drawn = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in losses.lines}
    assert list(drawn.items()) == [
        ("loss", [[1, 4], [2, 2], [3, 1], [4, 0.5]]),
        ("reconstruction", [[1, 3], [2, 1]]),
        ("critic_loss", [[2, 0.5], [4, 0.25]]),
    ]
    assert [np.asarray(line.get_xydata()).tolist() for line in norm.lines] == [[[3, 0.1], [4, 0.2]]]
