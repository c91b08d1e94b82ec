"""A rank's step needs what is modelled for its share of the minibatch and for what the others tell it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import memory_worker
from helpers.jobs import ends, start_job

from engine.configuration import planning
from engine.configuration.config import Config
from engine.configuration.modelling import predict
from engine.configuration.planning import Planner, choose_chunk
from engine.support.errors import InputError
from engine.training.planner import RANKS_LIBRARY, Footprint
from engine.training.ranks import Ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What rank 0 of 2 needs, which has the larger share."""
    folder = tmp_path_factory.mktemp("memory")
    for status, errors in ends(start_job(2, [memory_worker.__file__, str(folder)])):
        assert status == 0, errors
    return json.loads((folder / "0.json").read_text())


def predicted(case: str, size: int, **flags: Any) -> int:
    config = memory_worker.configuration(case).replaced(flags)
    plans = Planner(config)
    return predict(config, plans.generator, plans.extractor, size=size).peak


@pytest.mark.parametrize("case", memory_worker.CASES)
def test_prediction_for_a_rank_is_what_the_allocator_reports(case: str, measured: dict[str, int]) -> None:
    assert predicted(case, 2) == pytest.approx(measured[case], rel=0.01)


def test_moments_of_every_rank_have_their_room() -> None:
    """With the same share, a rank more is 2·D numbers more, and gloo's copy of those that travel together."""
    plans = Planner(memory_worker.configuration("moments"))
    features = plans.extractor.num_features
    few, many = (predicted("moments", size, batch_size=2 * size) for size in (16, 32))
    received = 16 * 2 * features * 4
    assert received < many - few < 1.5 * received


def test_pooled_features_of_every_rank_have_their_room() -> None:
    few, many = (predicted("mmd", size, batch_size=64 * size, chunk_size=1) for size in (1, 2))
    assert few < many < predicted("mmd", 1, batch_size=128, chunk_size=1)


def test_modelling_leaves_no_process_group() -> None:
    predicted("plain", 2)
    assert not dist.is_initialized()


def told(rank: int, theirs: int | None) -> Ranks:
    """One of two ranks, whose other one takes a chunk of `theirs`; None if it must not be asked."""
    ranks = Ranks(rank, 2)

    def meet(name: str, message: int) -> list[int]:
        assert theirs is not None
        return [message, theirs] if rank == 0 else [theirs, message]

    ranks.meet = meet  # type: ignore[assignment, method-assign]
    return ranks


def configuration(**flags: Any) -> Config:
    return Config.build("digits", {"weights": ("random",), "batch_size": 15, **flags})


@pytest.mark.parametrize(
    ("budget", "theirs", "chunk"), [(180, 8, None), (179, 8, 4), (180, 2, 2), (179, 2, 2), (119, 8, 1)]
)
def test_ranks_take_the_smallest_chunk_of_all(
    budget: int, theirs: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def footprint(config: Config, *rest: Any) -> Footprint:
        assert rest[3] == 2, "predicted for two ranks"
        return Footprint(0, 0, 100 + 10 * (config.matching.chunk_size or 8))

    monkeypatch.setattr(planning, "predict", footprint)
    config = configuration(chunk_size="auto", memory_budget=f"{budget}B")
    for rank in (0, 1):
        assert choose_chunk(config, CPU, told(rank, theirs)).matching.chunk_size == chunk


def test_a_chunk_that_was_given_is_kept_and_held_against_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "predict", lambda *_: Footprint(0, 0, 2**30))
    config = configuration(chunk_size=4, memory_budget="1GiB")
    assert choose_chunk(config, CPU, told(0, None)) == config
    with pytest.raises(InputError, match=r"these settings need 1\.00 GiB"):
        choose_chunk(config.replaced({"memory_budget": "1GB"}), CPU, told(0, None))


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_memory", lambda: 1000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert planning.budget_bytes(configuration(), CPU, 4) == 212
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert planning.budget_bytes(configuration(), CPU, 4) == 425
    assert planning.budget_bytes(configuration(), CPU) == 850


def test_plans_are_of_a_ranks_share_and_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration(memory_budget="1GiB", kernels="reference", layers=1)
    planning.print_plans(config, CPU, told(1, None))
    assert capsys.readouterr().out == ""
    planning.print_plans(config, CPU, told(0, None))
    text = capsys.readouterr().out
    assert "minibatch 15 on 2 ranks (here: of the largest share, 8)," in text
    chunks = [line.split()[0] for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert chunks[0] == "8"
    assert set(chunks) <= {"8", "4", "2", "1"}


def test_a_gpu_has_room_for_the_library_of_ranks() -> None:
    config = memory_worker.configuration("plain").replaced({"kernels": "auto"})
    plans = Planner(config)
    alone, two = (predict(config, plans.generator, plans.extractor, torch.device("cuda"), size) for size in (1, 2))
    assert two.beside - alone.beside == sum(RANKS_LIBRARY.values())
