"""The throughput benchmark: every variant is right before it is timed, and a wrong one is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import throughput
from bench.scenario import RECOMPUTE_GENERATOR, Problem, Scenario, engine_step, plain_step

SMALL = Problem("vgg-small", 32)


@pytest.fixture(scope="module")
def rows():
    return throughput.measure_variants(SMALL, 8, "cpu", 1, torch.bfloat16)


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


def test_ratios(rows):
    seconds = {(row.variant, row.dtype): row.p50 for row in rows}
    found = throughput.ratios(rows)
    assert found["naive / ours --amp"] == seconds["naive", "float32"] / seconds["ours", "bf16"]
    floor = seconds["convolution floor", "bf16"] + seconds["generator alone", "bf16"]
    assert found["ours --amp / (convolution floor + generator)"] == seconds["ours", "bf16"] / floor
    lines = throughput.ratios_table(rows).splitlines()
    assert lines[2:] == [f"| {name} | {value:.2f} |" for name, value in found.items()]


def test_table_holds_the_rows(rows, capsys):
    throughput.print_rows(rows)
    headings, _, *lines = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert headings == ["variant", "dtype", "p20, s", "p50", "p80", "images/s", "gradient error"]
    assert [line[:2] for line in lines] == [[row.variant, row.dtype] for row in rows]
    for row, line in zip(rows, lines, strict=True):
        assert [float(cell) for cell in line[2:5]] == pytest.approx([row.p20, row.p50, row.p80], abs=6e-4)
        assert float(line[5]) == pytest.approx(row.images_per_second, abs=0.6)
        assert len(line) == (6 if math.isnan(row.gradient_error) else 7)


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    right = Scenario.naive

    def wrong(self, **switches):
        objective = right(self, **switches)
        with torch.no_grad():
            next(objective.networks.parameters()).mul_(1.1)
        return objective

    monkeypatch.setattr(Scenario, "naive", wrong)
    with pytest.raises(RuntimeError, match="naive, float32: gradient off by"):
        throughput.measure_variants(SMALL, 8, "cpu", 1, torch.bfloat16)


def test_scale(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "SCALE", (1, 2, 3))
    command = "--scale --extractor vgg-small --batch-size 4 --repetitions 1 --device cpu --json"
    throughput.main([*command.split(), str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["minibatch"] for row in rows] == [4, 8, 12]
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][0] == "minibatch"
    assert lines[0][-1] == "/ minibatch 8"
    per_image = [row["p50"] / row["minibatch"] for row in rows]
    for row, line, own in zip(rows, lines[2:], per_image, strict=True):
        assert line[0] == str(row["minibatch"])
        assert [float(cell) for cell in line[4:]] == pytest.approx(
            [1e3 * own, own / per_image[0], own / per_image[1]], abs=6e-3
        )


@pytest.mark.parametrize(
    ("flags", "message"), [("--repetitions 0", "--repetitions"), ("--batch-size 1", "--batch-size")]
)
def test_bad_input(flags, message, capsys):
    with pytest.raises(SystemExit):
        throughput.main(flags.split())
    assert message in capsys.readouterr().err


def test_convolutions_are_all_there():
    scenario = Scenario.shapes(Problem("vgg19+resnet18", 32))
    shapes = [tuple(grad.shape) for _, _, grad in throughput.Convolutions(scenario.extractor, 2).work]
    assert len(shapes) == 16 + 16 + 3  # VGG19's, ResNet18's up to its 16th ReLU, shortcuts that change the width
    assert shapes[0] == (2, 64, 32, 32)


def test_engine_and_naive_version_take_the_same_step():
    """From the same generator, z and target both losses send the generator the same way."""
    scenario = Scenario.calibrated(SMALL, "cpu")
    parts = scenario.parts(8)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    ours, naive = (images.clone().requires_grad_() for _ in range(2))
    parts.objective(ours).backward()
    scenario.naive()(naive).backward()
    # AMA's first step is α·sign(Δ), so each of the few features whose Δ is nearly 0 may differ.
    assert torch.nn.functional.cosine_similarity(ours.grad.flatten(), naive.grad.flatten(), dim=0) > 0.999


def test_steps_train_the_generator():
    scenario = Scenario.calibrated(SMALL, "cpu")
    parts = scenario.parts(4, torch.bfloat16, chunk_size=2, **RECOMPUTE_GENERATOR)
    generator = scenario.generator()
    for network, step in (
        (parts.generator, engine_step(parts)),
        (generator, plain_step(generator, scenario.naive(), 4)),
    ):
        before = [parameter.detach().clone() for parameter in network.parameters()]
        step()
        assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_a_chunk_is_at_most_the_minibatch():
    scenario = Scenario.shapes(SMALL)
    assert scenario.config(4, chunk_size=8).matching.chunk_size is None
    assert scenario.config(8, chunk_size=8).matching.chunk_size == 8
