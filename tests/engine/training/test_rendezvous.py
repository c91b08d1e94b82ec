"""Processes that wait for others in vain: one line, in limited time, that says for whom."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from engine.support.errors import InputError
from engine.training import rendezvous
from engine.training.ranks import Ranks


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    """Sets what a launcher would tell a process."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)

    def tell(**environment: str) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return tell


def test_without_a_launcher_there_is_one_process(told) -> None:
    assert rendezvous.join() == (0, 1, None)


def test_a_rank_that_never_starts(told) -> None:
    told(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), GFMN_JOIN_TIMEOUT="0.5")
    with pytest.raises(InputError, match=r"^process 0 waited 0.5 s for process 1 of 2 \(WORLD_SIZE\), which did not"):
        Ranks.join()


@pytest.mark.parametrize("launcher", [False, True])
def test_nobody_at_the_address(launcher: bool, told) -> None:
    port = free_port()
    told(WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GFMN_JOIN_TIMEOUT="0.5")
    if launcher:
        told(TORCHELASTIC_USE_AGENT_STORE="True")
    server = "the launcher" if launcher else "process 0"
    with pytest.raises(InputError, match=f"process 1 of 2 waited 0.5 s for {server} at 127.0.0.1:{port}.*refused"):
        rendezvous.join()


@pytest.mark.parametrize("first", [0, 1], ids=["rank 0 first", "rank 1 first"])
def test_a_second_attempt_knows_nothing_of_the_first(first: int, told) -> None:
    """Under `torchrun --max-restarts` the launcher serves one store to all attempts, and starts processes at any time.

    Launchers of several machines do not count attempts alike, so nothing here counts.
    """
    port = free_port()
    served = dist.TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
    served.set("late", "2")
    told(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    with ThreadPoolExecutor(2) as both:
        for _ in range(3):
            early = both.submit(rendezvous._meet, first, 2, 20.0)
            time.sleep(0.5)
            late = both.submit(rendezvous._meet, 1 - first, 2, 20.0)
            stores = early.result(), late.result()
            assert [store.add("failures", 1) for store in stores] == [1, 2]
            assert stores[0].clone().get("failures") == b"2"


def test_a_port_that_is_taken(told) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GFMN_JOIN_TIMEOUT="1")
        with pytest.raises(InputError, match="process 0 of 2 cannot serve the job's store"):
            rendezvous.join()


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two'"),
        ({"WORLD_SIZE": "2"}, "no RANK; start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"process 2 \(RANK\) of 2 \(WORLD_SIZE\)"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "no MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "29500"}, "no MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "1", "GFMN_JOIN_TIMEOUT": "soon"}, "GFMN_JOIN_TIMEOUT .*'soon'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_an_environment_that_is_no_job(environment: dict[str, str], named: str, told) -> None:
    told(**environment)
    with pytest.raises(InputError, match=named):
        rendezvous.join()


def test_one_of_those_that_came_says_who_is_missing(told) -> None:
    told(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    with ThreadPoolExecutor(2) as both:
        waiting = [both.submit(rendezvous._meet, rank, 4, 2.0) for rank in (0, 2)]
        errors = [future.exception() for future in waiting]
    told_it = [error for error in errors if isinstance(error, InputError)]
    assert len(told_it) == 1, errors
    assert "waited 2 s for process 1, 3 of 4" in str(told_it[0])
    assert sum(isinstance(error, rendezvous.EndedElsewhere) for error in errors) == 1


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")  # the second process of the second machine
    assert Ranks(3, 5).device(torch.device("cuda")) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 of this machine has no GPU of its own") as refused:
        Ranks(4, 5).device(torch.device("cuda"))
    assert refused.value.argument == "device"
    assert Ranks(4, 5).device(torch.device("cpu")) == torch.device("cpu")
    assert chosen == [1]
