"""The data benchmark: complete rows, a plot, and no number for a wrong result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bench import data
from engine.configuration.command import run_command


def test_quick_run_gives_complete_rows(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    data.main(["--quick", "--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["op"] for row in rows} == {"JPEG folder", "arrays in memory", "statistics pass, vgg-small"}
    for row in rows:
        assert row["images_per_second_p20"] <= row["images_per_second_p50"] <= row["images_per_second_p80"]
        assert row["cpu_us_per_image"] > 0
        assert row["images"] == {"J": 130, "a": 1000, "s": 64}[row["op"][0]]
        assert {"torch", "torchvision", "numpy"} <= set(row["environment"]["versions"])
        assert row["environment"]["commit"]
        assert "CPU" in row["environment"]["processor"]
        assert row["environment"]["load"] >= 0
    firsts = {row["op"]: row for row in reversed(rows)}
    assert all(row["relative_time"] == 1 for row in firsts.values())
    printed = capsys.readouterr().out
    assert all(row["path"] in printed for row in rows)
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.size[0] > 500


def test_different_counts_are_no_measurement() -> None:
    ways = [data.Way("all", lambda: 10), data.Way("one too few", lambda: 9)]
    with pytest.raises(RuntimeError, match="different numbers"):
        next(data.compare_ways("counts", "-", ways, 1))


def test_rows_are_those_of_the_rounds_so_far() -> None:
    seen = list(data.compare_ways("counts", "-", [data.Way("a", lambda: 7), data.Way("b", lambda: 7)], 3))
    assert [[(row.path, row.repetitions, row.images) for row in rows] for rows in seen] == [
        [("a", n, 7), ("b", n, 7)] for n in (1, 2, 3)
    ]


def test_images_go_to_the_device_that_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    """Loaders, extractor and rows; on CUDA DALI decodes there, and a row says so."""
    loaders, timed, placed = [], [], []
    real = data.ImageLoader

    class Loader(real):
        def __init__(self, *arguments: object, device: str = "cpu", **options: object):
            loaders.append(device)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(data, "ImageLoader", Loader)
    monkeypatch.setattr(data, "choose_device", lambda name: None)
    monkeypatch.setattr(data, "environment", lambda device: {"device": device})
    monkeypatch.setattr(data, "seconds", lambda call, device: (call(), timed.append(device), 1.0)[2])
    build = data.build_extractor

    def built(*arguments: object, **options: object):
        extractor = build(*arguments, **options)
        extractor.to = lambda device: (placed.append(device), extractor)[1]
        return extractor

    monkeypatch.setattr(data, "build_extractor", built)
    data.main(["--quick", "--device", "cuda", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert set(loaders) == set(timed) == set(placed) == {"cuda"}
    assert all(row["environment"] == {"device": "cuda"} for row in rows)
    assert all(row["path"].endswith(", cuda") for row in rows if "torchvision" not in row["path"])


def test_a_device_that_is_not_there_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_command(data.main, ["--device", "cuda"])
    assert exit_.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: --device: cuda is not available here (no GPU, or no driver); use --device cpu\n"
    )


def test_different_images_are_no_measurement(tmp_path: Path) -> None:
    data.make_folder(tmp_path, 4)
    loader = data.ImageLoader(data.open_dataset("celeba", tmp_path, image_size=64), 4, backend="torch")
    right = next(iter(loader)).images
    data.check_same([right], loader)
    shifted = right.roll(1, dims=3)
    with pytest.raises(RuntimeError, match="differs by"):
        data.check_same([shifted], loader)
