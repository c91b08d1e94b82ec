"""Ranks are chunks: W processes with shares of a minibatch take the step of a single one (float64, gloo)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import rank_worker
from helpers.rank_worker import CASES
from oracle import relative_error
from torch import Tensor

from engine.training.ranks import ALONE, Ranks

TESTS = Path(__file__).parents[2]


def launch(folder: Path, size: int, cases: list[str]) -> None:
    """`rank_worker.py` in `size` processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, rank_worker.__file__, str(folder), *cases]
    processes = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[dict[str, Tensor]]]:
    """(case, W) → what every rank has at the end."""
    folder = tmp_path_factory.mktemp("ranks")
    for size in (2, 3, 4):
        launch(folder, size, list(CASES))
    return {
        (case, size): [torch.load(folder / f"{case}.{size}.{rank}.pt") for rank in range(size)]
        for case in CASES
        for size in (2, 3, 4)
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return {case: rank_worker.run(case, ALONE) for case in CASES}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_take_the_step_of_one(case: str, size: int, found, alone) -> None:
    # AMA's first steps are sign-like: what is nearly zero may go either way.
    tolerance = 1e-9 if case.startswith("ama") else 1e-12
    expected = alone[case]
    first, *others = found[case, size]
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert relative_error(first[name], value) <= tolerance, name
        else:
            assert torch.equal(first[name], value), name
        for other in others:
            assert torch.equal(other[name], first[name]), f"{name} differs between ranks"


class TestAlone:
    def test_everything_is_its_argument(self) -> None:
        x = torch.randn(3, 2)
        assert ALONE.share(5) == slice(0, 5)
        assert ALONE.merge(x) is x
        assert ALONE.gather(x) == (x, slice(0, 3))
        assert ALONE.counts(4) == [4]
        assert ALONE.agree(True)
        assert not ALONE.agree(False)
        kept = x.clone()
        ALONE.sum_([x])
        assert torch.equal(x, kept)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (3, 3), (64, 7), (2, 5), (1, 1)])
def test_shares_are_even_and_complete(count: int, size: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    rows = list(range(count))
    assert [row for share in shares for row in rows[share]] == rows
    lengths = [len(rows[share]) for share in shares]
    assert max(lengths) - min(lengths) <= 1
