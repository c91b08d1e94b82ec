"""Ranks are chunks: W processes with shares of a minibatch take the step of a single one (float64, gloo)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import capture_worker, rank_worker, resume_worker
from helpers.jobs import ends, start_job
from helpers.marks import quick, slow
from helpers.rank_worker import AVERAGERS, CASES, DISTANCES
from oracle import relative_error
from torch import Tensor

from engine.training.graphs import EAGER_STEPS
from engine.training.ranks import ALONE, Ranks
from engine.training.run_folder import RunFolder

# Four ranks for every averager and for pooled features; what else there is, for two and three.
ASKED = [(case, size) for case in CASES for size in (2, 3, 4) if size < 4 or case in {*AVERAGERS, "odd", "mmd"}]
THREE = ("ama", "odd", "chunks", "groups", "mmd")
QUICK = [(case, size) for case, size in ASKED if size == (3 if case in THREE else 2)]
"""The others are slow tests."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[dict[str, Tensor]]]:
    """Of a case and W: what every rank has at the end. One job finds those of all quick, or all slow, tests of W."""
    folder = tmp_path_factory.mktemp("ranks")

    def of(case: str, size: int) -> list[dict[str, Tensor]]:
        files = [folder / f"{case}.{size}.{rank}.pt" for rank in range(size)]
        if not files[0].exists():
            quick = (case, size) in QUICK
            cases = [name for name, asked in ASKED if asked == size and ((name, asked) in QUICK) == quick]
            for status, errors in ends(start_job(size, [rank_worker.__file__, str(folder), *cases])):
                assert status == 0, errors
        return [torch.load(file) for file in files]

    return of


@pytest.fixture(scope="module")
def alone() -> Callable[[str], dict[str, Tensor]]:
    return functools.cache(lambda case: rank_worker.run(case, ALONE))


@pytest.mark.parametrize(("case", "size"), quick(ASKED, QUICK))
def test_ranks_take_the_step_of_one(case: str, size: int, found, alone) -> None:
    # AMA's first steps are sign-like: what is nearly zero may go either way.
    tolerance = 1e-9 if case.startswith("ama") or case in DISTANCES.keys() - {"mmd"} else 1e-12
    expected = alone(case)
    first, *others = found(case, size)
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert relative_error(first[name], value) <= tolerance, name
        else:
            assert torch.equal(first[name], value), name
        for other in others:
            assert torch.equal(other[name], first[name]), f"{name} differs between ranks"


@pytest.mark.parametrize("size", [slow(2), 3])
def test_groups_of_taps_give_the_same_bits(size: int, found) -> None:
    for grouped, whole in zip(found("groups", size), found("chunks", size), strict=True):
        assert grouped.keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in grouped.items())


def test_a_rank_that_cannot_capture_its_step_holds_nobody_up(tmp_path: Path) -> None:
    """The other one has captured, and goes on without its graph."""
    for status, errors in ends(start_job(2, [capture_worker.__file__, str(tmp_path)])):
        assert status == 0, errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["sums"] == second["sums"] == [3.0] * (EAGER_STEPS + 3)
    assert [first["log"], second["log"]] == [["capture"], ["capture"]], "no replays"
    assert "another process of this job cannot" in first["said"]
    assert "not permitted" in second["said"]


class TestAlone:
    def test_everything_is_its_argument(self) -> None:
        x = torch.randn(3, 2)
        assert ALONE.share(5) == slice(0, 5)
        assert ALONE.merge(x) is x
        assert ALONE.gather(x) == (x, slice(0, 3))
        assert ALONE.counts(4) == [4]
        assert ALONE.from_first(b"word") == b"word"
        kept = x.clone()
        ALONE.sum_([x])
        ALONE.copy_first([x])
        assert torch.equal(x, kept)


@pytest.mark.parametrize("unit", [1, 2, 10])
@pytest.mark.parametrize(("count", "size"), [(7, 3), (3, 3), (64, 7), (2, 5), (1, 1)])
def test_shares_are_even_and_complete(count: int, size: int, unit: int) -> None:
    shares = [Ranks(rank, size).share(count, unit) for rank in range(size)]
    rows = list(range(count))
    assert [row for share in shares for row in rows[share]] == rows
    lengths = [-(-len(rows[share]) // unit) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert all(share.start % unit == 0 for share in shares if rows[share])


def test_resumed_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    """2 ranks, then 1, then 3 take the run of one process, with checkpoint files between them (float64)."""
    cases = ["none", "chunks", "ama"]
    changing, whole = tmp_path / "changing", tmp_path / "whole"
    for size, stop in ((2, 3), (1, 5), (3, 8)):
        if size == 1:
            for case in cases:
                resume_worker.train(changing, stop, case, ALONE)
            continue
        for status, errors in ends(
            start_job(size, [resume_worker.__file__, str(changing), str(stop), *cases]), within=400
        ):
            assert status == 0, errors
    for case in cases:
        resume_worker.train(whole, 8, case, ALONE)
        found, expected = (RunFolder(folder / case).newest_checkpoint() for folder in (changing, whole))
        assert found.step == expected.step == 8
        assert found.parts.keys() == expected.parts.keys()
        compared = 0
        for part, tensors in expected.parts.items():
            for name, value in tensors.items():
                if not value.is_floating_point():
                    assert torch.equal(found.parts[part][name], value), f"{part} {name}"
                    continue
                compared += value.dtype == torch.float64
                assert relative_error(found.parts[part][name], value) <= 1e-9, f"{part} {name}"
        assert compared > 10
