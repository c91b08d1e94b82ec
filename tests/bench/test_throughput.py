"""The throughput benchmark: every variant is right before it is timed, and a wrong one is refused."""

from __future__ import annotations

import json

import pytest
import torch

from bench import throughput
from bench.scenario import Scenario


@pytest.fixture(scope="module")
def rows():
    return throughput.measure("vgg-small", 32, 8, "cpu", 1, torch.bfloat16)


def test_every_variant_is_there_and_right(rows):
    assert [(row.variant, row.dtype) for row in rows] == [
        ("naive", "float32"),
        ("naive, frozen", "float32"),
        ("naive, frozen, compiled", "float32"),
        ("naive, frozen, compiled, autocast", "bf16"),
        ("ours", "float32"),
        ("convolution floor", "float32"),
        ("generator alone", "float32"),
        ("ours", "bf16"),
        ("convolution floor", "bf16"),
        ("generator alone", "bf16"),
    ]
    for row in rows:
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert row.images_per_second == 8 / row.p50
        compared = row.variant.startswith(("naive", "ours"))
        assert (row.gradient_error <= (5e-3 if row.dtype == "float32" else 0.2)) == compared
        assert row.environment["commit"]


def test_ratios_and_tables(rows, capsys, tmp_path):
    seconds = {(row.variant, row.dtype): row.p50 for row in rows}
    found = throughput.ratios(rows)
    assert found["naive / ours --amp"] == seconds["naive", "float32"] / seconds["ours", "bf16"]
    floor = seconds["convolution floor", "bf16"] + seconds["generator alone", "bf16"]
    assert found["ours --amp / (convolution floor + generator)"] == seconds["ours", "bf16"] / floor
    throughput.print_rows(rows)
    assert "naive, frozen, compiled, autocast" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    right = Scenario.naive

    def wrong(self, **switches):
        objective = right(self, **switches)
        with torch.no_grad():
            next(objective.networks.parameters()).mul_(1.1)
        return objective

    monkeypatch.setattr(Scenario, "naive", wrong)
    with pytest.raises(RuntimeError, match="naive, float32: gradient off by"):
        throughput.measure("vgg-small", 32, 8, "cpu", 1, torch.bfloat16)


def test_scale(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "SCALE", (1, 2, 3))
    command = "--scale --extractor vgg-small --batch-size 4 --repetitions 1 --device cpu --json"
    throughput.main([*command.split(), str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["minibatch"] for row in rows] == [4, 8, 12]
    assert capsys.readouterr().out.count("\n") == 5


@pytest.mark.parametrize(
    ("flags", "message"), [("--repetitions 0", "--repetitions"), ("--batch-size 1", "--batch-size")]
)
def test_bad_input(flags, message, capsys):
    with pytest.raises(SystemExit):
        throughput.main(flags.split())
    assert message in capsys.readouterr().err


def test_convolutions_are_all_there():
    scenario = Scenario.build("vgg19+resnet18", 32, 2, "cpu")
    shapes = [tuple(grad.shape) for _, _, grad in throughput.Convolutions(scenario.extractor, 2).work]
    assert len(shapes) == 16 + 16 + 3  # VGG19's, ResNet18's up to its 16th ReLU, shortcuts that change the width
    assert shapes[0] == (2, 64, 32, 32)
