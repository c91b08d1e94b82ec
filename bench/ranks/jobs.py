"""Jobs of several processes on this machine, which wait to be told what to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any


class Job:
    """`size` ranks of a job, started as `torchrun` starts them; each answers a line of JSON with one of its own.

    Between two questions they wait for their input, and need no processor. Use it in a `with`.

    Args:
        size: number of processes.
        threads: of each.
        task: of `bench.ranks.tasks`.
        options: what the task takes, as JSON holds it.
    """

    def __init__(self, size: int, threads: int, task: str, **options: Any):
        self.size, self.threads = size, threads
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size),
                  "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": str(threads)}  # fmt: skip
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.ranks.tasks", task, json.dumps({"threads": threads, **options})],
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def ask(self, question: object = None) -> list[Any]:
        """Everybody's answer, in rank order; RuntimeError if one has none."""
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            except OSError:
                continue  # it has ended, as will be seen
        return [self._answer(rank) for rank in range(self.size)]

    def _answer(self, rank: int) -> Any:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"rank {rank} of {self.size} ended with status {self.processes[rank].wait()}")
        return json.loads(line)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let them end, or end them."""
        for process in self.processes:
            if kind is not None:
                process.kill()
            process.communicate()
