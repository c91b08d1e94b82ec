"""Training with a graph is training without: whole runs, with a graph of recorded operators in CUDA's place.

A replay has the addresses and the numbers of the capture, so whatever a step should have kept in place, or out of
Python, makes these runs differ.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.marks import slow
from helpers.recorded_graphs import RecordedGraphs, RecordedLane
from helpers.runs import command, same_run

from engine import train
from engine.comparison.distances.moments import Moments
from engine.configuration.build import make_method
from engine.configuration.config import Config
from engine.configuration.planning import Planner
from engine.configuration.running import make_schedule
from engine.generation.drawn_ahead import DrawnAhead
from engine.methods.matching import Matching
from engine.support.errors import InputError
from engine.training.graphs import EAGER_STEPS
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer
from kernels import reference

pytestmark = pytest.mark.usefixtures("own_cache")

STEPS = 12


@pytest.fixture
def with_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], RecordedGraphs]:
    """From the call on, commands train with recorded graphs, and z drawn ahead."""

    def use() -> RecordedGraphs:
        graphs = RecordedGraphs()

        def machinery(config: Config, device: torch.device) -> dict[str, Any]:
            noise = DrawnAhead(config.training.seed, RecordedLane())
            return {"noise": noise, "kernels": reference, "graphs": graphs}

        monkeypatch.setattr(train, "make_machinery", machinery)
        return graphs

    return use


def checkpoints(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "checkpoints").iterdir())}


LONGER = ["--steps", str(STEPS)]


@pytest.mark.parametrize(
    "more",
    [
        ["--averager", "ama", "--generator-ema", "0.9"],
        slow(["--averager", "ma", "--ma-variant", "authors", "--chunk-size", "3"]),
        ["--averager", "none", "--recompute", "stages", "--recompute-generator"],
        slow(["--amp", "--generator-ema", "0.5"]),
        [
            *("--generator-ema", "0.5,0.9", "--sample-ema", "0.9", "--optimizer", "adamw", "--clip-grad", "0.1"),
            *("--lr-schedule", "cosine", "--warmup-steps", "2"),
        ],
        slow(["--amp", "--amp-dtype", "fp16", "--chunk-size", "2"]),
        ["--method", "mmd", "--mmd-images", "20"],
    ],
    ids=lambda more: " ".join(more).replace("--", ""),
)
def test_a_graphed_run_has_the_same_bits(more: list[str], flags: list[str], tmp_path: Path, with_graphs) -> None:
    argv = [*flags, *LONGER, *more]
    train.main([*argv, "--out", str(tmp_path / "eager")])
    graphs = with_graphs()
    train.main([*argv, "--out", str(tmp_path / "graphed")])
    assert graphs.log == ["aside"] * EAGER_STEPS + ["capture"] + ["replay"] * (STEPS - EAGER_STEPS)
    assert same_metrics(tmp_path / "eager", tmp_path / "graphed")
    assert checkpoints(tmp_path / "eager") == checkpoints(tmp_path / "graphed")


def same_metrics(one: Path, other: Path) -> bool:
    """Of any method; and the same generator."""
    times = ("images_per_second", "peak_memory_bytes")
    lines = [
        [{k: v for k, v in json.loads(line).items() if k not in times} for line in text.splitlines()]
        for text in ((run / "metrics.jsonl").read_text() for run in (one, other))
    ]
    weights = [(run / "generator.safetensors").read_bytes() for run in (one, other)]
    return lines[0] == lines[1] and weights[0] == weights[1] and len(lines[0]) == STEPS


@pytest.mark.parametrize("resumed_with", ["graphs", "none"])
def test_resumed_in_the_middle(resumed_with: str, flags: list[str], tmp_path: Path, with_graphs, monkeypatch) -> None:
    more = [*flags, *LONGER, "--generator-ema", "0.9"]
    train.main([*more, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_machinery", train.make_machinery)
        with_graphs()
        train.main([*more, "--steps", "7", "--out", str(tmp_path / "parts")])
    if resumed_with == "graphs":
        graphs = with_graphs()
    train.main(["--resume", "--steps", str(STEPS), "--out", str(tmp_path / "parts")])
    if resumed_with == "graphs":
        assert graphs.log == ["aside"] * EAGER_STEPS + ["capture"] + ["replay"] * 2
    assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_profile_traces_replays(flags: list[str], tmp_path: Path, with_graphs, capsys) -> None:
    with_graphs()
    train.main([*flags, *LONGER, "--profile", "2", "--out", str(tmp_path / "run")])
    events = json.loads((tmp_path / "run" / "profile.json").read_text())["traceEvents"]
    names = [str(event.get("name", "")) for event in events]
    # The fourth step captures, the fifth is the profiler's own warm-up.
    assert sorted(name for name in set(names) if name.startswith("ProfilerStep#")) == [
        "ProfilerStep#5",
        "ProfilerStep#6",
    ]
    assert not any("backward" in name.lower() and "evaluate_function" in name for name in names), "no autograd ran"
    code, error = command(train.main, [*flags, "--profile", "2", "--out", str(tmp_path / "short")], capsys)
    assert code == 2
    assert "--profile: 2 steps after 5 of warm-up are more than 6" in error


SETTINGS = {"weights": ("random",), "batch_size": 4, "kernels": "reference", "layers": 2, "nz": 8, "generator_ema": 0.9}


def pair(**settings: Any) -> tuple[Trainer, Trainer, RecordedGraphs]:
    """Two trainers of the same thing, the second with a graph."""
    config = Config.build("digits", {**SETTINGS, **settings})
    graphs = RecordedGraphs()

    def make(graphs: RecordedGraphs | None) -> Trainer:
        torch.manual_seed(0)
        plans = Planner(config)
        ones = torch.ones(plans.extractor.num_features, dtype=torch.float64)
        method = make_method(config, plans.generator, plans.extractor, Moments(2, ones, ones))
        noise = DrawnAhead(config.training.seed, RecordedLane())
        return Trainer(method, make_schedule(config), RunFolder("nowhere"), {}, noise=noise, graphs=graphs)

    return make(None), make(graphs), graphs


def steps(trainers: tuple[Trainer, Trainer], count: int) -> None:
    for _ in range(count):
        scalars = [trainer.train_step() for trainer in trainers]
        assert scalars[0].keys() == scalars[1].keys()
        assert all(torch.equal(value, scalars[1][name]) for name, value in scalars[0].items())


def assert_same_state(one: Trainer, other: Trainer) -> None:
    found, expected = one._checkpoint(), other._checkpoint()
    assert (found.step, found.parts.keys()) == (expected.step, expected.parts.keys())
    for part, state in expected.parts.items():
        assert found.parts[part].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(found.parts[part][name], value), f"{part}/{name}"


def test_looking_at_samples_in_between_changes_nothing() -> None:
    eager, graphed, _ = pair()
    steps((eager, graphed), 6)
    assert torch.equal(graphed.picture(), eager.picture())
    graphed.sampler().draw_pixels(20, 3)
    steps((eager, graphed), 2)
    assert torch.equal(graphed.picture(), eager.picture())
    assert graphed.ema is not None
    assert graphed.ema.updates == 8
    assert_same_state(graphed, eager)


def test_another_rate_in_python_is_captured_anew() -> None:
    eager, graphed, graphs = pair()
    steps((eager, graphed), 6)
    for trainer in (eager, graphed):
        trainer._scale_lr(1)
    assert "drain" not in graphs.log, "nothing changed"
    for trainer in (eager, graphed):
        trainer._scale_lr(0.25)
        assert trainer.lr == 0.25 * trainer.method.optimizers["generator"].defaults["lr"]
    steps((eager, graphed), 6)
    assert graphs.log.count("capture") == 2
    assert_same_state(graphed, eager)


def test_a_rate_on_the_device_changes_in_place() -> None:
    eager, graphed, graphs = pair()
    groups = [trainer.method.optimizers["generator"].param_groups[0] for trainer in (eager, graphed)]
    for group in groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
    on_device = groups[1]["lr"]
    unchanged, _, _ = pair()
    steps((eager, graphed), 6)
    rate = eager.lr
    for trainer in (eager, graphed):
        trainer._scale_lr(0.25)
        assert trainer.lr == 0.25 * rate, "in full"
    assert groups[1]["lr"] is on_device
    assert torch.equal(on_device, torch.tensor(0.25 * rate))
    steps((eager, graphed), 6)
    assert graphs.log.count("capture") == 1
    assert_same_state(graphed, eager)
    for _ in range(12):
        unchanged.train_step()
    weights = (next(trainer.method.modules["generator"].parameters()) for trainer in (graphed, unchanged))
    assert not torch.equal(*weights), "the rate matters"


@pytest.mark.parametrize("rate", ["of Python", "on the device"])
def test_restoring_replaces_state_and_captures_anew(rate: str) -> None:
    """Back to an older checkpoint, in the same trainer: the optimizer's tensors are others then."""
    eager, graphed, graphs = pair()
    for trainer in (eager, graphed) if rate == "on the device" else ():
        for group in trainer.method.optimizers["generator"].param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
    steps((eager, graphed), 5)
    # What a file would hold; the parts of `_checkpoint` are the trainer's own tensors.
    kept = [trainer._checkpoint() for trainer in (eager, graphed)]
    for checkpoint in kept:
        checkpoint.parts = {
            part: {name: value.clone() for name, value in state.items()} for part, state in checkpoint.parts.items()
        }
    steps((eager, graphed), 3)
    for trainer, checkpoint in zip((eager, graphed), kept, strict=True):
        trainer.restore(checkpoint)
        assert trainer.step == int(trainer.divergence.steps["generator"]) == 5
    steps((eager, graphed), 6)
    assert graphs.log.count("capture") == 2
    assert_same_state(graphed, eager)


def test_the_first_bad_step_is_found_in_a_replay() -> None:
    eager, graphed, graphs = pair()
    steps((eager, graphed), 6)
    graphed.check_finite()
    with torch.no_grad():
        next(graphed.method.modules["generator"].parameters()).fill_(float("nan"))
    for _ in range(3):
        graphed.train_step()
    assert graphs.log[-1] == "replay"
    with pytest.raises(InputError, match="the loss became NaN or infinite at step 7"):
        graphed.check_finite()


def test_a_schedule_changes_the_rate_in_place() -> None:
    """And what an evaluation multiplies it by holds for the steps after it."""
    eager, graphed, graphs = pair(lr_schedule="cosine", warmup_steps=2, steps=20)
    place = graphed.method.optimizers["generator"].param_groups[0]["lr"]
    steps((eager, graphed), 7)
    for trainer in (eager, graphed):
        trainer._scale_lr(0.5)
    steps((eager, graphed), 7)
    assert graphs.log.count("capture") == 1
    assert graphed.method.optimizers["generator"].param_groups[0]["lr"] is place
    base = graphed.method.optimizers["generator"].defaults["lr"]
    assert float(place) == pytest.approx(0.5 * base * (1 + math.cos(math.pi * (13 - 2) / 18)) / 2)
    assert_same_state(graphed, eager)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted_in_a_replay() -> None:
    eager, graphed, graphs = pair(max_skipped=2)
    factors = [torch.ones(()) for _ in (eager, graphed)]
    for trainer, factor in zip((eager, graphed), factors, strict=True):
        weight = next(trainer.method.modules["generator"].parameters())
        weight.register_hook(lambda gradient, factor=factor: gradient * factor)
    steps((eager, graphed), 6)
    for factor in factors:
        factor.fill_(float("nan"))
    before = next(graphed.method.modules["generator"].parameters()).clone()
    steps((eager, graphed), 2)
    assert torch.equal(before, next(graphed.method.modules["generator"].parameters()))
    graphed.check_finite()
    for factor in factors:
        factor.fill_(1)
    steps((eager, graphed), 1)
    assert not torch.equal(before, next(graphed.method.modules["generator"].parameters()))
    assert [int(count) for count in graphed.divergence.state_dict().values()] == [2, 0]
    assert_same_state(graphed, eager)
    factors[1].fill_(float("inf"))
    for _ in range(3):
        graphed.train_step()
    assert graphs.log[-1] == "replay"
    with pytest.raises(InputError, match="the gradient, 3 times in a row, became NaN or infinite at step 12"):
        graphed.check_finite()


@pytest.mark.parametrize("where", [slow("first"), "backward", slow("optimizer"), "scaler"])
def test_a_step_that_cannot_be_captured_goes_on_as_if_nothing_was(where: str, monkeypatch, caplog) -> None:
    """It fails at its beginning, after backward, in the middle of the optimizer's step, and of the loss scaling."""
    eager, graphed, graphs = pair(amp=True, amp_dtype="fp16")
    for trainer in (eager, graphed):
        assert isinstance(trainer.method, Matching)
        scaler = trainer.method.gradient_step.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0})  # no step overflows and is skipped
    assert isinstance(graphed.method, Matching)
    owner, name = {
        "first": (graphed.method.generator, "count_batch"),
        "backward": (graphed.method.low, "collect_gradients"),
        "optimizer": (graphed.method.gradient_step.optimizer, "step"),
        "scaler": (graphed.method.gradient_step.scaler, "update"),
    }[where]
    original = getattr(owner, name)

    @functools.wraps(original)
    def reading(*arguments: Any, **options: Any) -> Any:
        graphed.divergence.first_bad["generator"].item()  # waits for the device
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, reading)
    steps((eager, graphed), 7)
    assert graphs.log == ["aside"] * EAGER_STEPS + ["capture"]
    assert "cannot be captured in a CUDA graph (operation not permitted when stream is capturing)" in caplog.text
    assert len(caplog.records) == 1
    assert_same_state(graphed, eager)


@pytest.mark.parametrize("precision", [{}, {"amp": True, "amp_dtype": "fp16"}], ids=["float32", "fp16"])
def test_an_optimizer_that_fails_says_why(precision: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not there is a loss scaling to be put right."""
    trainer, _, _ = pair(**precision)
    assert isinstance(trainer.method, Matching)

    @functools.wraps(trainer.method.gradient_step.optimizer.step)
    def failing(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no room for the optimizer's state")

    monkeypatch.setattr(trainer.method.gradient_step.optimizer, "step", failing)
    with pytest.raises(RuntimeError, match="no room for the optimizer"):
        trainer.train_step()
