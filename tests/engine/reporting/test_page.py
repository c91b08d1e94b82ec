"""The report as a file: well formed, complete, and one clear line for every mistake."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.report_page import Outline, change, error_of, text_of, write
from PIL import Image

from engine import report
from engine.reporting.pictures import samples_over_time
from engine.training.run_folder import RunFolder


def test_page_is_one_file_and_well_formed(page: Path) -> None:
    markup = page.read_text()
    outline = Outline(markup)
    assert outline.mistakes == []
    assert markup.startswith("<!DOCTYPE html>")
    for _, attributes in outline.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (name, value)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(|https?://", markup)
    assert len(outline.all("h1")) == len(outline.all("title")) == len(outline.all("script")) == 1
    assert all(image.get("alt") and image.get("width") and image.get("height") for image in outline.all("img"))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in outline.all("svg"))
    assert len(markup) < 2_000_000


def test_page_says_what_the_run_was(page: Path) -> None:
    text = text_of(page.read_text())
    for fact in (
        "dcgan generator",
        "matched to vgg-small (random weights)",
        "images, 60 images of 32×32",
        "· step 6 ·",
    ):
        assert fact in text
    assert re.search(r"layers 2 \(preset: –\)", text)
    assert "all 60 real images" in text
    assert text.index("Samples over time") < text.index("Losses") < text.index("Nearest real") < text.index("Configur")
    assert f"torch {torch.__version__.split('+')[0]}" in text


def test_same_run_same_page(page: Path, finished: Path, tmp_path: Path) -> None:
    before = page.read_bytes()
    report.main(["--run", str(finished), "--out", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_bytes() == before
    report.main(["--run", str(finished), "--out", str(tmp_path / "other.html"), "--seed", "1"])
    assert (tmp_path / "other.html").read_bytes() != before


def test_what_a_person_wrote_stays_text(run: Path) -> None:
    change(run, "data", data="/nowhere/<script>alert(1)</script>&\"'.npy")
    markup = write(run, "--title", "<b>&amp;</b>{{ 1 + 1 }}")
    outline = Outline(markup)
    assert outline.mistakes == []
    assert len(outline.all("script")) == 1
    assert not outline.all("b")
    assert "<script>alert" not in markup
    text = text_of(markup)
    assert "<b>&amp;</b>{{ 1 + 1 }}" in text
    assert text.count("<script>alert(1)</script>") >= 3  # why there are no neighbours, the configuration, the command


def test_moved_data_cost_a_warning(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(run, "data", data="/nowhere/digits.npy")
    with caplog.at_level(logging.WARNING, "gfmn"):
        text = text_of(write(run))
    assert "Left out: /nowhere/digits.npy: no such file" in text
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "/nowhere/digits.npy" in warning.getMessage()
    assert "\n" not in warning.getMessage()


def test_another_extractor_or_dataset_than_in_training_is_said(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "fewer.npy", np.load(json.loads((run / "config.json").read_text())["data"]["data"])[:50])
    change(run, "data", data=str(tmp_path / "fewer.npy"))
    change(run, "training", seed=5)
    text = text_of(write(run))
    assert "Mind that the extractor’s weights are not those of the training" in text
    assert "Mind that the data set had 60 images in training" in text


def test_stopped_early_and_nothing_drawn(run: Path) -> None:
    for path in [*(run / "samples").iterdir(), run / "samples.png", *(run / "checkpoints").iterdir()]:
        path.unlink()
    change(run, "training", steps=100)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    markup = write(run)
    assert Outline(markup).mistakes == []
    text = text_of(markup)
    assert "step 6 of 100" in text
    assert "Samples over time" not in text
    assert "Losses" in text
    (run / "metrics.jsonl").unlink()
    assert "No step was logged" in text_of(write(run))


def test_values_that_are_not_finite_or_not_there(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1]["loss"], rows[2]["difference_norm"] = float("nan"), float("inf")
    del rows[3]["images_per_second"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, [1], {"loss": 3}]))
    (run / "samples/step_00000009.png").write_bytes(b"no picture")
    markup = write(run)
    assert Outline(markup).mistakes == []
    assert not re.search(r"\bnan\b|\binf\b", markup)
    losses = markup.split("<h2>Losses</h2>")[1].split("</section>")[0]
    drawn = [len(points.split()) for points in re.findall(r'<polyline points="(.*?)"', losses)]
    assert drawn == [5, 6, 6, 5, 5]  # loss, its two parts, ‖Δ‖, images per second
    assert "of training" not in text_of(markup)  # no sum of times with one missing
    assert [step for step in re.findall(r'<figure data-step="(.*?)"', markup)] == ["2", "4", "6"]


def test_many_pictures_stay_few(run: Path) -> None:
    with Image.open(run / "samples/step_00000002.png") as picture:
        picture.load()
        for step in range(10, 60):
            picture.save(run / f"samples/step_{step:08d}.png")
    markup = write(run)
    shown = re.findall(r'<figure data-step="(.*?)"', markup)
    assert (len(shown), shown[0], shown[-1]) == (24, "2", "59")
    assert "24 of the run’s 53 pictures, evenly chosen" in text_of(markup)


def test_large_images_make_a_page_of_a_few_megabytes(run: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1042, 1042, 3), dtype=np.uint8)
    for step in range(10, 40):
        Image.fromarray(noise).save(run / f"samples/step_{step:08d}.png")
    steps = samples_over_time(RunFolder(run), 128)
    assert len(steps.pictures) == 12
    assert {picture.count for _, picture in steps.pictures} == {4}
    assert sum(len(picture.png) for _, picture in steps.pictures) < 3_000_000


def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    of_run = ["--run", str(run)]
    assert str(tmp_path / "empty") in error_of(["--run", str(tmp_path / "empty")], capsys)
    assert str(tmp_path / "none") in error_of(["--run", str(tmp_path / "none")], capsys)
    assert "error: --seed: " in error_of([*of_run, "--seed=-1"], capsys)
    assert "error: --neighbours-of: " in error_of([*of_run, "--neighbours-of", "1"], capsys)
    assert "--out: " in error_of([*of_run, "--out", str(tmp_path)], capsys)
    assert "--run" in error_of([], capsys)
    assert "error: --weights: " in error_of([*of_run, "--weights", "some.file"], capsys)
    assert "error: --feature-extractor: " in error_of([*of_run, "--feature-extractor", "nonsense"], capsys)
    assert "error: --weights: " in error_of([*of_run, "--feature-extractor", "vgg-small"], capsys)
    (run / "config.json").write_text("{}")
    assert "config.json: " in error_of(of_run, capsys)
    (run / "config.json").unlink()
    assert "config.json: " in error_of(of_run, capsys)
    (run / "generator.safetensors").unlink()
    assert str(run) in error_of(of_run, capsys)
    assert not (run / "report.html").exists()
