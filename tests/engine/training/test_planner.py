"""What is modelled without memory is what PyTorch's allocator reports; and what builds on it: auto, budget, --plan."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.marks import slow

from bench.rows import peak_memory
from engine import train
from engine.comparison.distances.moments import Moments
from engine.configuration import modelling, planning
from engine.configuration.build import make_method
from engine.configuration.command import run_command
from engine.configuration.config import Config
from engine.configuration.groups import memory_bytes
from engine.configuration.modelling import predict
from engine.configuration.planning import Planner, choose_chunk
from engine.configuration.running import make_schedule
from engine.generation.networks import build_generator
from engine.support.errors import InputError
from engine.training.planner import Footprint, StorageTracker
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer

CPU = torch.device("cpu")


def configuration(**flags: Any) -> Config:
    return Config.build("digits", {"weights": ("random",), "batch_size": 16, "kernels": "reference", **flags})


def predicted(config: Config, plans: Planner) -> Footprint:
    return predict(config, plans.generator, plans.extractor)


def measured(config: Config, plans: Planner) -> int:
    """What the allocator reports from before objective and optimizer are made to the end of the second step."""
    ones = torch.ones(plans.extractor.num_features, dtype=torch.float64)
    target = Moments(2, ones, ones)

    def two_steps() -> None:
        method = make_method(config, plans.generator, plans.extractor, target)
        trainer = Trainer(method, make_schedule(config), RunFolder("nowhere"), {})
        trainer.train_step()
        trainer.train_step()

    gc.collect()
    plans.generator.zero_grad(set_to_none=True)
    return peak_memory(two_steps, CPU)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"chunk_size": 4},
        {"recompute": "stages", "recompute_generator": True},
        {"amp": True},
        slow({"amp": True, "chunk_size": 4, "recompute_generator": True, "averager": "ma"}),
        {"generator_ema": (0.5, 0.9, 0.99), "optimizer": "adamw", "clip_grad": 0.1},
        {"generator_ema": None, "feature_scale": "target-deviation"},
        slow({"generator": "resnet", "batch_size": 4, "amp": True, "recompute": "stages"}),
        {"extractor_bn": "batch"},
    ],
    ids=lambda flags: " ".join(f"{name}={value}" for name, value in flags.items()) or "plain",
)
def test_prediction_is_within_a_tenth_of_the_allocator(flags: dict[str, Any]) -> None:
    config = configuration(**flags)
    plans = Planner(config)
    assert predicted(config, plans).peak == pytest.approx(measured(config, plans), rel=0.1)


def test_fused_kernels_are_modelled_without_the_plain_ones_temporaries() -> None:
    config = configuration(kernels="compiled")
    plans = Planner(config)
    measured(config.replaced({"batch_size": 4}), plans)  # compiles
    assert predicted(config, plans).peak == pytest.approx(measured(config, plans), rel=0.1)
    assert predicted(config, plans).peak < predicted(config.replaced({"kernels": "reference"}), plans).peak


def test_float16_with_its_loss_scaling_can_be_modelled() -> None:
    config = configuration(amp=True)
    plans = Planner(config)
    half = predict(config.replaced({"amp_dtype": "fp16"}), plans.generator, plans.extractor)
    other = predict(config, plans.generator, plans.extractor)
    assert half.peak == pytest.approx(other.peak, rel=0.1)


def test_large_minibatches_cost_no_memory_and_grow_linearly() -> None:
    config = configuration(kernels="compiled")
    plans = Planner(config)

    def peak(minibatch: int, **flags: Any) -> int:
        return predicted(config.replaced({"batch_size": minibatch, **flags}), plans).peak

    large = {}
    allocated = peak_memory(lambda: large.update(peak=peak(2**16)), CPU)
    assert large["peak"] > 2**35
    assert allocated < 2**20
    small, middle = peak(2**10), peak(2**12)
    assert large["peak"] == pytest.approx(middle + (middle - small) * 20, rel=0.01)
    # With chunks, what grows is images and generator; many small chunks take no more time to model than three.
    assert peak(2**16, chunk_size=1, recompute_generator=True) < large["peak"] / 2


def test_no_chunk_is_left_out_that_would_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(chunk_size=2)
    plans = Planner(config)
    some = predicted(config, plans)
    monkeypatch.setattr(modelling, "_MODELLED_CHUNKS", 100)
    assert predicted(config, plans) == some


def test_tracker_counts_storages_once_until_nobody_holds_them() -> None:
    weight = torch.zeros(4)
    with StorageTracker([weight]) as tracker:
        x = torch.zeros(1000)
        view = x[10:].view(9, 110)
        x += 1
        weight.view(2, 2).add_(1)
        assert (tracker.now, tracker.peak) == (4000, 4000)
        y = x * 2
        del x
        assert (tracker.now, tracker.peak) == (8000, 8000)
        del view
        assert (tracker.now, tracker.peak) == (4000, 8000)
        del y
        assert tracker.now == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 * 2**30), ("800MB", 800 * 10**6), ("1.5 kib", 1536), ("2tb", 2 * 10**12), ("4096B", 4096)],
)
def test_sizes(text: str, size: int) -> None:
    assert memory_bytes(text) == size


@pytest.mark.parametrize("text", ["12", "GiB", "-1GiB", "0MB", "12 gigabytes", "1iB", " "])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="is not a size; give a number and its unit") as error:
        configuration(memory_budget=text)
    assert error.value.argument == "memory_budget"


def fixed_footprints(monkeypatch: pytest.MonkeyPatch, total: Callable[[Config], int]) -> None:
    monkeypatch.setattr(planning, "predict", lambda config, *rest: Footprint(0, 0, total(config)))


def test_auto_takes_the_largest_chunk_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_footprints(monkeypatch, lambda config: 100 + 10 * (config.matching.chunk_size or config.training.batch_size))

    def chosen(budget: int, **flags: Any) -> object:
        config = configuration(chunk_size="auto", memory_budget=f"{budget}B", **flags)
        return choose_chunk(config, CPU).matching.chunk_size

    assert chosen(260) is None
    assert chosen(259) == 8
    assert chosen(110) == 1
    assert chosen(199, batch_size=13) == 7
    assert chosen(169, batch_size=13) == 4
    with pytest.raises(InputError, match=r"even a chunk of 1 image needs 0.0 MiB .modelled., the budget is 0.0 MiB"):
        chosen(109)
    assert chosen(260, extractor_bn="batch") is None
    with pytest.raises(InputError, match="the whole minibatch at once"):
        chosen(259, extractor_bn="batch")


def test_a_budget_is_a_limit_for_fixed_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_footprints(monkeypatch, lambda config: 2**30)
    config = configuration(memory_budget="1GiB", chunk_size=4)
    assert choose_chunk(config, CPU) == config
    with pytest.raises(InputError, match=r"these settings need 1.00 GiB .*; try --chunk-size auto"):
        choose_chunk(config.replaced({"memory_budget": "1GB"}), CPU)


def test_without_a_budget_most_of_the_free_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < planning.available_memory() < 2**50
    monkeypatch.setattr(planning, "available_memory", lambda: 1000)
    assert planning.budget_bytes(configuration(), CPU) == 850


def command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        run_command(train.main, argv)
    return int(exit_.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--chunk-size many", "'many' is neither a number of images nor 'auto'"),
        ("--chunk-size 0", "--chunk-size: must be at least 1, got 0"),
        ("--chunk-size 65", "--chunk-size: is larger than the minibatch: 65 > 64"),
        ("--chunk-size auto --memory-budget 1MB", "the budget is 1.0 MiB"),
        ("--memory-budget lots", "--memory-budget: 'lots' is not a size"),
    ],
)
def test_mistakes_are_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, text = command([*flags.split(), "--device", "cpu", "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_plan_prints_a_table_and_touches_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("--plan opens no data")

    monkeypatch.setattr(train, "open_data", never)
    monkeypatch.chdir(tmp_path)
    flags = "--plan --preset cifar10 --extractor vgg-small --data nowhere --batch-size 8 --memory-budget 31MiB"
    train.main([*flags.split(), "--device", "cpu"])
    text = capsys.readouterr().out
    assert text.count("modelled") >= 3
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert rows[0][:3] == ["8", "none", "kept"]
    assert {row[-1] for row in rows} == {"yes", "no"}
    peaks = {tuple(row[:3]): float(row[3]) for row in rows}
    assert peaks["4", "none", "kept"] < peaks["8", "none", "kept"]
    assert peaks["8", "none", "recomputed"] < peaks["8", "none", "kept"]
    assert not list(tmp_path.iterdir())


def test_auto_trains_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    flags = """--weights random --batch-size 4 --layers 2 --kernels reference --loader torch --steps 1 --device cpu
        --threads 1 --recompute stages --recompute-generator --chunk-size auto --memory-budget 4GiB"""
    train.main([*flags.split(), "--out", str(run)])
    assert json.loads((run / "config.json").read_text())["matching"]["chunk_size"] is None
    train.main(f"--resume --out {run} --steps 2 --chunk-size 2 --memory-budget 2GiB --recompute none".split())
    matching = Config.load(run / "config.json").matching
    assert (matching.chunk_size, matching.memory_budget, matching.recompute) == (2, "2GiB", "none")


def test_models_leave_the_networks_as_they_were() -> None:
    config = configuration(amp=True)
    plans = Planner(config)
    generator = build_generator("dcgan", image_size=32)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    predict(config, generator, plans.extractor)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert plans.extractor.dtype is torch.float32
    assert dataclasses.replace(Footprint(1, 2, 3)).total == 4
