"""What planning knows of a GPU, on a machine without one: rounding, workspaces, samples, launches, and when to ask."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import command, same_run
from torch import nn

from engine import train
from engine.configuration import modelling, planning
from engine.configuration.config import Config
from engine.configuration.modelling import predict
from engine.configuration.planning import TIME_MODEL, Plan, Planner, choose_chunk
from engine.evaluation.judges import EvaluationNetwork
from engine.support.errors import InputError
from engine.training import planner
from engine.training.planner import GPU_LIBRARIES, FakeMode, Footprint, gpu_block, num_bytes, release_memory, track
from pipelines import release_pools

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 2**20
LIBRARIES = sum(GPU_LIBRARIES.values())


def configuration(**flags: Any) -> Config:
    return Config.build("digits", {"weights": ("random",), "batch_size": 16, **flags})


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (0, 0),
        (1, 512),
        (512, 512),
        (513, 1024),
        (MIB + 1, MIB + 512),
        (10 * MIB - 1, 10 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (851_968 * 8, 851_968 * 8),
    ],
)
def test_blocks_of_the_allocator(size: int, block: int) -> None:
    assert gpu_block(size) == block


def test_a_step_is_rounded_tensor_by_tensor() -> None:
    """By hand: a weight of 400 bytes; its gradient between two steps; of a step 4,000 bytes twice."""
    weight = nn.Linear(100, 1, bias=False)
    mode = FakeMode()
    fake = planner.fake_copy(weight, mode)

    def build() -> Any:
        held = [torch.zeros(100)]

        def step() -> None:
            x = torch.empty(1000)
            y = x + 1
            del x, y

        return lambda: (step(), held)

    assert track(build, mode, [fake]) == Footprint(400, 400, 400 + 8000)
    assert track(build, mode, [fake], gpu_block) == Footprint(512, 512, 512 + 2 * 4096)


def test_a_gpu_needs_what_a_cpu_needs_and_what_is_beside_it() -> None:
    config = configuration(kernels="reference")
    plans = Planner(config)
    on_cpu, on_gpu = (predict(config, plans.generator, plans.extractor, device) for device in (CPU, CUDA))
    assert on_cpu.beside == 0
    assert on_cpu.total == on_cpu.weights + on_cpu.peak
    assert on_cpu.peak <= on_gpu.peak <= 1.05 * on_cpu.peak
    assert on_gpu.weights == num_bytes(plans.generator, plans.extractor, block=gpu_block) > on_cpu.weights
    assert on_gpu.total == on_gpu.weights + on_gpu.peak + on_gpu.beside
    # Without a graph, samples take of the memory that a step has left.
    assert LIBRARIES <= on_gpu.beside <= LIBRARIES + modelling._outside_steps(config, plans.generator)


def test_beside_a_graphs_pool_samples_and_evaluations_count_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration()
    plans = Planner(config)
    monkeypatch.setattr(modelling, "_outside_steps", lambda *_: 10**12)
    found = {}
    for captured in (True, False):
        monkeypatch.setattr(modelling, "is_captured", lambda config, captured=captured: captured)
        found[captured] = predict(config, plans.generator, plans.extractor, CUDA)
    assert found[True].beside == 10**12 + LIBRARIES
    assert found[False].beside == 10**12 + LIBRARIES - (found[False].peak - found[False].between_steps)


def test_drawing_takes_a_copy_of_the_generator_and_its_activations() -> None:
    """By hand, of a generator without activations to speak of: z, and images."""
    config = configuration()
    generator = Planner(config).generator

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spec, self.weight = generator.spec, nn.Parameter(torch.zeros(1000))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z.new_empty(len(z), 3, 32, 32)

    expected = gpu_block(4000) + gpu_block(256 * config.networks.nz * 4) + gpu_block(256 * 3 * 32 * 32 * 4)
    assert modelling._outside_steps(config, Flat()) == expected


def test_the_network_that_evaluates_counts() -> None:
    config = configuration(evaluate_every=10, evaluate_extractor="vgg19")
    generator = Planner(config).generator
    small = modelling._outside_steps(config, generator)
    alone = modelling._outside_steps(configuration(), generator)
    assert alone < small
    # What cannot judge these images is refused by name, or later by whoever makes the evaluation.
    assert (
        modelling._outside_steps(config.replaced({"evaluate_extractor": "torchvision:inception_v3"}), generator)
        == alone
    )
    with pytest.raises(InputError) as error:
        modelling._outside_steps(config.replaced({"evaluate_extractor": "nothing"}), generator)
    assert error.value.argument == "evaluate_extractor"
    inception = modelling._outside_steps(configuration(evaluate_every=10), generator)
    # Its 21.8 million weights or more, and the images of 299 pixels with the first layers' maps of 64 × 147 × 147.
    least = 4 * (21_800_000 + 128 * (3 * 299**2 + 2 * 64 * 147**2))
    assert small < least < inception < 3 * 2**30
    assert inspect.signature(EvaluationNetwork.features).parameters["batch_size"].default == modelling._JUDGED_AT_ONCE


@pytest.mark.parametrize(
    ("chunk", "launches", "time"),
    [
        (None, 0, 1.0),
        (64, 0, 1.5),
        (None, 512, 1.0),
        (2048, 512, 1.5),
        (512, 512, 1.5),
        (256, 512, 3.0),
        (64, 512, 12.0),
        (64, 64, 1.5),
        (1, 64, 96.0),
    ],
)
def test_small_chunks_cost_a_gpu_their_launches(chunk: int | None, launches: int, time: float) -> None:
    assert Plan(chunk, "none", False, Footprint(0, 0, 0), 4096, launches).relative_time == time


def test_a_minibatch_that_is_launch_bound_itself_is_the_unit() -> None:
    def time(chunk: int | None) -> float:
        return Plan(chunk, "none", False, Footprint(0, 0, 0), 128, 512).relative_time

    assert (time(None), time(64), time(32)) == (1.0, 3.0, 6.0)


def test_the_time_model_says_what_it_knows() -> None:
    config = configuration()
    assert Planner(config).time_model == TIME_MODEL
    for kernels, images in (("reference", 512), ("auto", 64)):
        text = Planner(config.replaced({"kernels": kernels}), CUDA).time_model
        assert text.startswith(TIME_MODEL)
        assert f"one of {images} images" in text


def test_free_memory_of_a_gpu_decides(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**12))
    per_image, asked = 10, []

    def predicted(config: Config, generator: object, extractor: object, device: torch.device, *_: object) -> Footprint:
        asked.append(device)
        return Footprint(50, 0, per_image * (config.matching.chunk_size or config.training.batch_size), 200)

    monkeypatch.setattr(planning, "predict", predicted)
    assert planning.budget_bytes(configuration(), CUDA) == 850
    config = configuration(chunk_size="auto", kernels="reference", batch_size=1024)
    with caplog.at_level("INFO", "gfmn"):
        assert choose_chunk(config, CUDA).matching.chunk_size == 32  # 50 + 10 · 32 + 200 ≤ 850 < 50 + 10 · 64 + 200
    assert set(asked) == {CUDA}
    assert "below 512 (modelled)" in caplog.text
    caplog.clear()
    per_image = 0.01
    with caplog.at_level("INFO", "gfmn"):
        assert choose_chunk(config, CUDA).matching.chunk_size is None
    assert not caplog.text


def test_planning_for_a_gpu_that_is_elsewhere(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    argv = ["--plan", "--weights", "random", "--layers", "1", "--batch-size", "4", "--device", "cuda"]
    code, errors = command(train.main, argv, capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "--memory-budget: there is no GPU here to ask" in errors
    train.main([*argv, "--memory-budget", "80GiB"])
    text = capsys.readouterr().out
    assert "budget: 80.00 GiB\n" in text
    assert f"libraries ({LIBRARIES / MIB:.1f} MiB), samples and evaluations" in text
    assert "to launch its kernels" in text
    assert "torch loader" not in text
    plan = "--plan --method gan --batch-size 4 --device cuda --memory-budget 80GiB --loader torch"
    train.main(plan.split())
    assert "; not included: a data set of arrays, which the torch loader keeps whole" in capsys.readouterr().out
    code, errors = command(train.main, [word for word in argv if word != "--plan"], capsys)
    assert "--device: cuda is not available here" in errors


RUN = """--weights random --batch-size 8 --layers 2 --nz 8 --kernels reference --loader torch --checkpoint-every 1
    --log-every 1 --device cpu --threads 1"""


@pytest.mark.usefixtures("own_cache")
def test_a_resumed_run_keeps_the_chunk_that_auto_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another chunk would sum in another order: other bits."""
    memory = {"free": 1}
    monkeypatch.setattr(planning, "budget_bytes", lambda *_: memory["free"])
    monkeypatch.setattr(
        planning,
        "predict",
        lambda config, *_: Footprint(0, 0, config.matching.chunk_size or config.training.batch_size),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def trained(run: Path, *flags: str) -> object:
        train.main([*flags, "--out", str(run)])
        return json.loads((run / "config.json").read_text())["matching"]["chunk_size"]

    memory["free"] = 4
    assert trained(whole, *RUN.split(), "--chunk-size", "auto", "--steps", "4") == 4
    assert trained(parts, *RUN.split(), "--chunk-size", "auto", "--steps", "2") == 4
    memory["free"] = 2
    assert trained(parts, "--resume", "--steps", "4") == 4
    assert same_run(parts, whole)
    assert trained(parts, "--resume", "--steps", "5", "--chunk-size", "auto") == 2
    memory["free"] = 1000
    assert trained(tmp_path / "again", "--config", str(whole / "config.json")) == 4
    assert same_run(tmp_path / "again", whole)


def test_what_came_before_training_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append("PyTorch's"))
    backend = SimpleNamespace(ReleaseUnusedMemory=lambda: released.append("DALI's"))
    monkeypatch.setitem(sys.modules, "nvidia.dali.backend", backend)
    release_memory(CPU)
    assert released == []
    release_memory(CUDA)
    assert released == ["PyTorch's", "DALI's"]
    monkeypatch.delitem(sys.modules, "nvidia.dali.backend")
    release_memory(CUDA)  # no DALI, nothing to give back
    assert released == ["PyTorch's", "DALI's", "PyTorch's"]


def test_dali_has_what_gives_its_pools_back() -> None:
    backend = pytest.importorskip("nvidia.dali.backend")
    assert callable(backend.ReleaseUnusedMemory)
    release_pools()


@pytest.mark.usefixtures("own_cache")
def test_memory_is_given_back_between_the_target_and_the_first_step(tmp_path: Path, monkeypatch) -> None:
    seen: list[str] = []

    def watched(where: Any, name: str) -> None:
        before = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a, **k: (seen.append(name), before(*a, **k))[1])

    watched(train, "choose_chunk")
    watched(train, "make_reference")
    watched(train, "release_memory")
    watched(train.Trainer, "fit")
    train.main([*RUN.split(), "--steps", "1", "--out", str(tmp_path / "run")])
    assert seen == ["choose_chunk", "make_reference", "release_memory", "fit"]


def test_too_little_for_libraries_alone_is_said() -> None:
    config = configuration(chunk_size="auto", memory_budget="100MiB")
    with pytest.raises(InputError, match="even a chunk of 1 image needs"):
        choose_chunk(config, CUDA)
    assert choose_chunk(config, CPU).matching.chunk_size in (None, 8, 4, 2, 1)
