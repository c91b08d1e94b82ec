"""The job script for Slurm in docs/commands.md, run by bash with stand-ins for Slurm's commands and torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
STAND_INS = {
    "srun": 'exec "$@"',
    "scontrol": 'echo "$@" >> scontrol.log; echo one; echo two',
    # Ends with 1 when it is told to stop, as torchrun does, and with what the test asks for otherwise.
    "torchrun": 'echo "$@" > torchrun.log\ntrap "sleep 0.3; echo yes > checkpoint; exit 1" USR1\ntouch started\n'
    "while [ ! -e end ]; do sleep 0.05; done; exit $(cat end)",
}


@pytest.fixture
def script(tmp_path: Path):
    """Starts the page's script in a folder of its own."""
    (text,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "job.sh").write_text(text)
    for name, body in STAND_INS.items():
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f"#!/bin/bash\n{body}\n")
        stand_in.chmod(0o755)

    def start() -> subprocess.Popen[bytes]:
        told = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "one,two"}
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env={**os.environ, **told, "PATH": path})
        end = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < end:
            time.sleep(0.02)
        return job

    return start


def requeued(folder: Path) -> bool:
    return "requeue 17" in (folder / "scontrol.log").read_text()


def test_a_signal_is_handed_on_and_the_job_comes_again(script, tmp_path: Path) -> None:
    job = script()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert (tmp_path / "checkpoint").exists()  # before the requeue
    assert requeued(tmp_path)
    assert "--rdzv-endpoint one:29500" in (tmp_path / "torchrun.log").read_text()


@pytest.mark.parametrize("status", [0, 1])
def test_a_job_that_ends_by_itself_does_not_come_again(status: int, script, tmp_path: Path) -> None:
    (tmp_path / "end").write_text(str(status))
    assert script().wait(20) == status
    assert not requeued(tmp_path)
    assert "--preset cifar10" in (tmp_path / "torchrun.log").read_text()


def test_a_run_that_has_begun_is_resumed(script, tmp_path: Path) -> None:
    (tmp_path / "runs" / "job").mkdir(parents=True)
    (tmp_path / "runs" / "job" / "config.json").touch()
    (tmp_path / "end").write_text("0")
    assert script().wait(20) == 0
    assert (tmp_path / "torchrun.log").read_text().endswith("-m engine.train --resume --out runs/job\n")
