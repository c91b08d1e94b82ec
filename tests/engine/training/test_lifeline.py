"""Processes that a kill ends at any moment, without a launcher: those that wait for them say so."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.jobs import ends, start_ranks
from helpers.marks import slow

from engine.comparison.reference.cache import exclusive
from engine.support.errors import InputError, out_of_memory
from engine.training import lifeline
from engine.training.lifeline import KILLED, LOST
from engine.training.ranks import Ranks
from engine.training.rendezvous import EndedElsewhere

BEGIN = """
import os, signal, sys, time
from engine.configuration.command import run_command
from engine.training.job import job
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def main(argv):
    with job() as ranks:
        ranks.meet("all are here", None)
"""
WAITS = BEGIN + "        ranks.meet('again', None)\n" + "run_command(main)\n"
DIES = BEGIN + "        time.sleep(0.5)\n        die()\n" + "run_command(main)\n"
CHECKS = BEGIN + "        while True:\n            ranks.check(); time.sleep(0.1)\n" + "run_command(main)\n"
ENDS = BEGIN + "run_command(main)\n"
CONNECTS = BEGIN + "        ranks.counts(1)\n" + "run_command(main)\n"
LATER = "from engine.training import lifeline\nlifeline._GRACE += 3\n" + CONNECTS
PASSES = BEGIN + "        time.sleep(3 * ranks.rank)\n" + "run_command(main)\n"


@pytest.mark.parametrize(
    ("killed", "waits"),
    [(0, WAITS), slow(2, WAITS), (1, CHECKS)],
    ids=["who serves the store", "before a meeting", "between two batches"],
)
def test_a_killed_process_ends_those_that_wait(killed: int, waits: str) -> None:
    commands = [["-c", DIES if rank == killed else waits] for rank in range(3)]
    found = ends(start_ranks(commands), within=60)
    assert found.pop(killed)[0] == -signal.SIGKILL
    assert [status for status, _ in found] == [2, 2], found
    said = [line for _, errors in found for line in errors.splitlines() if line.startswith("error: ")]
    assert said
    assert all("another process of this job has ended (killed" in line for line in said), said
    assert len(said) == 1 or killed == 0  # without a store they cannot agree on who says it


@pytest.mark.slow
def test_one_killed_while_the_others_connect_is_not_waited_for() -> None:
    """They wait for it inside the library, where ten minutes are the limit; who serves the store comes to its end last,
    so that only one of them says why."""
    begun = time.monotonic()
    found = ends(start_ranks([["-c", program] for program in (CONNECTS, DIES, LATER)]), within=60)
    assert time.monotonic() - begun < 45
    assert [status for status, _ in found] == [2, -signal.SIGKILL, 2], found
    said = [line for _, errors in found for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, said
    assert "another process of this job has ended (killed" in said[0]


@pytest.mark.parametrize(
    ("library", "shown"),
    [
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:80", KILLED),
        (
            "NCCL error in: comm.cpp:77, remote process exited or there was a network error, NCCL version 2.27.5\n"
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
            KILLED,
        ),
        (
            "NCCL error in: comm.cpp:77, unhandled system error (run with NCCL_DEBUG=INFO for details)\n"
            "ncclSystemError: System call (e.g. socket, malloc) or external library call failed.\nLast error:\n"
            "socketStartConnect: Connect to 10.0.0.2<4000> failed : No route to host\n",
            "could not exchange tensors (NCCL error in: comm.cpp:77, unhandled system error (run with "
            "NCCL_DEBUG=INFO for details): socketStartConnect: Connect to 10.0.0.2<4000> failed : No route to host)",
        ),
        ("Timed out waiting 600000ms for recv operation", "could not exchange tensors (Timed out waiting 600000ms"),
    ],
    ids=["gloo's peer", "NCCL's peer", "NCCL's network", "time"],
)
def test_what_a_library_says_of_a_collective_is_shown(library: str, shown: str) -> None:
    with pytest.raises(InputError) as error, Ranks(0, 2, dist.HashStore())._together():
        raise RuntimeError(library)
    assert shown in str(error.value)
    assert "\n" not in str(error.value)


def test_no_memory_in_a_collective_stays_that() -> None:
    with pytest.raises(InputError) as error, Ranks(0, 2, dist.HashStore())._together():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "2.00 GiB more were asked for" in str(out_of_memory(error.value))


def test_who_waits_for_another_job_s_work_sees_its_own_job_s_end(tmp_path: Path) -> None:
    store, path = dist.HashStore(), tmp_path / "target"
    ranks = Ranks(0, 2, store)
    store.add("failures", 1)
    with exclusive(path), pytest.raises(EndedElsewhere), exclusive(path, ranks):
        pass
    with exclusive(path, ranks):  # which nobody is at: nothing to wait for
        assert (tmp_path / ".target.lock").exists()


def test_drafts_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    """Of a result, of the state of a pass, and of a checkpoint of pretraining; those of other files stay."""
    path = tmp_path / "target.safetensors"
    drafts = [
        f".{name}.abcdefgh.tmp" for name in (path.name, f"{path.name}.partial", "target.partial", "other.partial")
    ]
    for draft in drafts:
        (tmp_path / draft).touch()
    with exclusive(path):
        assert {file.name for file in tmp_path.glob(".*.tmp")} == {drafts[-1]}


def test_one_that_comes_to_its_end_is_not_waited_for() -> None:
    (ended, _), (waited, said) = ends(start_ranks([["-c", ENDS], ["-c", WAITS]]), within=60)
    assert (ended, waited) == (0, 2)
    assert "another process of this job has come to its end" in said


def test_ends_at_different_times_are_no_failure() -> None:
    assert ends(start_ranks([["-c", PASSES]] * 2), within=60) == [(0, ""), (0, "")]


def test_a_store_that_has_gone_ends_the_process_that_watches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def clone(self) -> None:
            raise RuntimeError("Connection reset by peer")

    ends = []
    monkeypatch.setattr(lifeline, "_GRACE", 0.0)
    monkeypatch.setattr(lifeline, "_POLL", 0.0)
    monkeypatch.setattr(os, "_exit", ends.append)
    lifeline.end_with_others(Gone(), threading.Event(), leave=lambda store: None)
    assert ends == [2]
    ended = threading.Event()
    ended.set()
    lifeline.end_with_others(Gone(), ended, leave=lambda store: None)
    assert ends == [2]


def test_a_group_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise RuntimeError("Unable to resolve hostname\nframe #0: somewhere")

    monkeypatch.setattr(dist, "init_process_group", unreachable)
    store = dist.HashStore()
    ranks = Ranks(0, 2, store)
    with pytest.raises(InputError, match=r"process 0 of 2 cannot connect to the others \(Unable to resolve hostname\)"):
        ranks.counts(1)
    store.add(LOST, 1)
    with pytest.raises(InputError, match="has ended"):
        ranks.counts(1)
    store.add("failures", 1)
    with pytest.raises(EndedElsewhere):
        ranks.counts(1)
