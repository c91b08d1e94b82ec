"""bench.memory on the smallest sizes: what is modelled is what is measured, for the naive implementation too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.marks import slow
from helpers.runs import command
from PIL import Image

from bench.memory import __main__ as program
from bench.memory import measuring
from bench.memory.measuring import largest_minibatch, measure_apart, model, saved_row, scale_rows
from bench.memory.rows import GIB, VARIANTS, MemoryRow, Variant
from bench.scenario import Problem
from engine.training.planner import shown_bytes
from engine.training.precision import cpu_computes_in

CPU = torch.device("cpu")
SMALL = Problem("vgg-small", 32, "dcgan")


@pytest.mark.parametrize("variant", [slow(VARIANTS[0]), VARIANTS[2], VARIANTS[6]], ids=lambda variant: variant.name)
def test_modelled_is_measured(variant: Variant) -> None:
    if variant.precision is not None and not cpu_computes_in(variant.precision):
        pytest.skip("without oneDNN's kernels PyTorch unfolds images, which the model knows nothing of")
    modelled = model(variant, SMALL, 16)
    measured, resident, baseline = measure_apart(variant, SMALL, 16, CPU)
    assert modelled.peak == pytest.approx(measured, rel=0.1)
    assert resident > baseline
    assert resident > measured


def test_every_variant_has_a_model_at_sizes_that_no_machine_has() -> None:
    peaks = {variant.name: model(variant, SMALL, 2**16).peak for variant in VARIANTS}
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True)
    assert peaks["naive"] > 100 * GIB > 4 * peaks[VARIANTS[-1].name]


@pytest.mark.parametrize("budget", [3, 1000, 12_345, 10**7, 10**9])
@pytest.mark.parametrize(
    "total",
    [lambda n: 10 * n, lambda n: 997 + 10 * n, lambda n: max(2000, 7 * n), lambda n: 500 + min(10 * n, 640) + n],
    ids=["line", "offset", "floor", "bend"],
)
def test_largest_minibatch(total: Callable[[int], int], budget: int) -> None:
    calls = 0

    def counted(n: int) -> int:
        nonlocal calls
        calls += 1
        return total(n)

    found = largest_minibatch(counted, budget)
    assert calls < 150
    if found == 0:
        assert total(2) > budget
    else:
        assert total(found) <= budget < total(int(found * 1.011) + 2)


def row(variant: str, minibatch: int, modelled: int, measured: int | None) -> MemoryRow:
    return MemoryRow(
        variant, "float32", "vgg-small", "dcgan", 32, minibatch, 0, modelled, measured, None, environment={}
    )


def test_scale_is_the_slope_between_the_largest_minibatches() -> None:
    rows = [row("ours", 4, 100, 90), row("ours", 8, 140, 110), row("ours", 16, 300, None), row("naive", 4, 1, None)]
    (scale,) = scale_rows(rows)
    assert (scale.variant, scale.modelled, scale.measured) == ("ours", 20.0, 5.0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "CAPACITY_PROBLEMS", (SMALL,))
    out, picture = tmp_path / "rows.json", tmp_path / "plots" / "memory.png"
    flags = "--extractor vgg-small --batch-sizes 16 8 64 --measure-up-to 60MiB --device cpu --variants naive"
    program.main([*flags.split(), "--json", str(out), "--plot", str(picture)])
    rows = json.loads(out.read_text())
    assert [entry["minibatch"] for entry in rows[:3]] == [8, 16, 64]
    assert [entry["measured"] is None for entry in rows[:3]] == [False, True, True]
    assert all(entry["environment"]["versions"]["torch"] for entry in rows)
    capacities = [entry["minibatch"] for entry in rows if "budget" in entry]
    assert len(capacities) == 4
    assert capacities == sorted(capacities)
    assert capacities[0] > 1000
    with Image.open(picture) as drawn:
        assert drawn.size == (1200, 750)
    lines = capsys.readouterr().out.splitlines()
    for entry in rows[:3]:
        (line,) = (line for line in lines if line.startswith(f"| naive | {entry['minibatch']} |"))
        assert shown_bytes(entry["modelled"]) in line
        assert entry["measured"] is None or f"{entry['modelled'] / entry['measured']:.3f}" in line
    assert f"| naive | {rows[3]['modelled'] / 1024:.0f} |  |" in lines, "one measured minibatch has no slope"
    assert "| largest minibatch (modelled) | variant | 12 GiB | 16 GiB | 24 GiB | 80 GiB |" in lines
    assert f"| vgg-small at 32, dcgan | naive | {' | '.join(map(str, capacities))} |" in lines


def test_rows_are_written_as_they_come_and_variants_can_be_chosen(tmp_path: Path, monkeypatch) -> None:
    path, kept = tmp_path / "rows.json", []

    def measured(variant: Variant, problem: Problem, minibatch: int, device: torch.device) -> tuple[int, int, int]:
        kept.append(len(json.loads(path.read_text())) if path.exists() else 0)
        if minibatch == 32:
            raise KeyboardInterrupt
        return 10**6, 10**8, 10**7

    monkeypatch.setattr(measuring, "measure_apart", measured)
    flags = ["--extractor", "vgg-small", "--batch-sizes", "8", "16", "32", "--no-capacity", "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        program.main([*flags, "--variants", "ours --amp", "--json", str(path)])
    assert kept == [0, 1, 2]
    rows = json.loads(path.read_text())
    assert [(row["variant"], row["minibatch"], row["measured"]) for row in rows] == [
        ("ours --amp", 8, 10**6),
        ("ours --amp", 16, 10**6),
    ]


def test_no_minibatch_is_measured_that_a_gpu_has_no_room_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(program, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**26, 2**40))
    monkeypatch.setattr(measuring, "environment", lambda device="cpu": {"device": str(device)})
    monkeypatch.setattr(measuring, "measure_apart", lambda *_: (10**6, 10**8, 10**7))
    monkeypatch.setattr(program, "saved_row", lambda problem, dtype, device: saved_row(problem, dtype, CPU))
    flags = ["--extractor", "vgg-small", "--batch-sizes", "8", "64", "--no-capacity", "--device", "cuda"]
    program.main([*flags, "--variants", "naive", "--json", str(tmp_path / "rows.json")])
    rows = [row for row in json.loads((tmp_path / "rows.json").read_text()) if "minibatch" in row]
    assert [row["weights"] + row["modelled"] < 0.8 * 2**26 for row in rows] == [True, False]
    assert [row["measured"] for row in rows] == [10**6, None]
    assert all(row["environment"] == {"device": "cuda"} for row in rows)


def test_a_failed_measurement_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"naive, minibatch 16: not measured: .*nothing"):
        measure_apart(VARIANTS[0], Problem("nothing", 32, "dcgan"), 16, CPU)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-sizes 1", "--batch-sizes: must be at least 2"),
        ("--measure-up-to 3", "--measure-up-to: '3' is not"),
        ("--variants best", "--variants: invalid choice: 'best'"),
        ("--device cuda", "--device: cuda is not available"),
        ("--whole", "--whole: is of --methods"),
        ("--methods --no-capacity", "--no-capacity: --methods has no such table"),
        ("--extractor nope", "--extractor: 'nope' is not known"),
        ("--image-size 33", "--extractor: vgg19 needs images whose side is a multiple of 32"),
    ],
)
def test_mistakes_are_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = command(program.main, flags.split(), capsys)
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_the_pair_saves_little_more_than_its_taps(dtype: torch.dtype | None) -> None:
    """At most 1.3 times; pooling indices and the images are what is more."""
    row = saved_row(Problem("vgg19+resnet18", 32, "dcgan"), dtype, CPU)
    assert row.floor == 851_968 * (4 if dtype is None else 2)
    assert 1 <= row.saved / row.floor <= 1.3
