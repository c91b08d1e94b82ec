"""Helpers: processes started as `torchrun` starts them, without its agent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]


def start_job(size: int, command: Sequence[str], **environment: str) -> list[subprocess.Popen[str]]:
    """`python *command` in `size` processes of one thread, in rank order."""
    return start_ranks([command] * size, **environment)


def start_torchrun(nodes: int, *command: str, launcher: Sequence[str] = ()) -> list[subprocess.Popen[str]]:
    """`torchrun *launcher -m *command` on `nodes` machines of one process each, all of which are this one."""
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{_free_port()}", "--rdzv-id", "test"]
    agent = ["-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", "1", *place, *launcher, "-m"]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, *agent, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(nodes)
    ]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(commands: Sequence[Sequence[str]], **environment: str) -> list[subprocess.Popen[str]]:
    """One process for each command, all of one job; their errors in pipes."""
    port = _free_port()
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(commands))}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def ends(job: Sequence[subprocess.Popen[str]], within: float = 120) -> list[tuple[int, str]]:
    """(exit status, standard error) of every rank; none outlives this."""
    try:
        errors = [process.communicate(timeout=within)[1] for process in job]
        return [(process.returncode, text) for process, text in zip(job, errors, strict=True)]
    finally:
        for process in job:
            process.kill()
            process.communicate()
