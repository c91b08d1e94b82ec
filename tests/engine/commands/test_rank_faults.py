"""A job that ends badly on one rank: all end, one says why, and the run goes on as if nothing had been."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.jobs import ends, start_job, start_torchrun
from helpers.marks import quick
from helpers.runs import same_run

from engine import train

pytestmark = pytest.mark.usefixtures("own_cache")

FLAGS = [
    *("--preset", "digits", "--device", "cpu", "--kernels", "reference", "--weights", "random", "--batch-size", "6"),
    *("--nz", "4", "--averager", "ma", "--lr", "1e-6", "--log-every", "1", "--sample-every", "1000"),
    *("--checkpoint-every", "4", "--steps", "12"),
]
COMMAND = "from engine.configuration.command import run_command\nfrom engine.train import main\nrun_command(main)\n"
AT_STEP = """
import os, pathlib, torch
from engine.support.errors import InputError
from engine.training.trainer import Trainer
take = Trainer.train_step
def acting(self):
    taken = take(self)
    if self.step == {step} and self.ranks.rank == {rank}:
        pathlib.Path({mark!r}).touch()
        {act}
    return taken
Trainer.train_step = acting
"""
RESTARTED = """
import os
from engine.support.errors import InputError
from engine.training.job import job
with job() as ranks:
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt == "0" and ranks.rank == 1:
        raise InputError("", "this attempt fails")
    for _ in range(3):
        assert ranks.meet("here", f"{attempt} {ranks.rank}") == [f"{attempt} 0", f"{attempt} 1"]
    print(f"attempt{attempt}rank{ranks.rank}", flush=True)
"""
# What happens → (on which rank, after which step, how, what the line says).
FAULTS = {
    "a full disk": (0, 8, "os.symlink('/dev/full', self.run.checkpoint_path(8))", "the disk is full"),
    "an error": (1, 6, "raise RuntimeError('no such thing')", "RuntimeError: no such thing"),
    "a NaN": (1, 6, "self.divergence.first_bad['generator'].fill_(6)", "NaN or infinite at step 6"),
    "no memory": (1, 6, "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')", "2.00 GiB"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, own_cache) -> Path:
    """Twelve steps of two ranks that nothing happens to; a single process has left the target in the cache before."""
    folder = tmp_path_factory.mktemp("whole")
    train.main([*FLAGS, "--steps", "1", "--out", str(folder / "alone")])
    succeed("-m", "engine.train", *FLAGS, "--out", str(folder / "run"))
    return folder / "run"


def succeed(*command: str) -> None:
    for status, errors in ends(start_job(2, command), within=300):
        assert status == 0, errors


@pytest.mark.parametrize("fault", quick(FAULTS, ["an error"]))
def test_a_fault_on_one_rank_ends_all(fault: str, whole: Path, tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    rank, step, act, said = FAULTS[fault]
    prelude = AT_STEP.format(rank=rank, step=step, act=act, mark=str(mark))
    found = ends(start_job(2, ["-c", prelude + COMMAND, *FLAGS, "--out", str(run)]), within=300)
    assert time.time() - mark.stat().st_mtime < 45
    assert [status for status, _ in found] == ([1, 2] if fault == "an error" else [2, 2])[:: -1 if rank else 1]
    speaking = [number for number, (_, errors) in enumerate(found) if "rror: " in errors]
    assert speaking == [rank]
    lines = [line for line in found[rank][1].splitlines() if "rror: " in line]
    assert len(lines) == 1
    assert said in lines[0]
    if fault == "a full disk":
        run.joinpath("checkpoints/step_00000008.safetensors").unlink()
    succeed("-m", "engine.train", "--resume", "--out", str(run))
    assert same_run(run, whole)


@pytest.mark.slow
def test_a_signal_to_the_launcher_of_one_machine_stops_both(whole: Path, tmp_path: Path) -> None:
    """Two machines under torchrun, told as the script for Slurm in docs/commands.md tells them; then resumed there."""
    run = tmp_path / "run"
    forwards = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    machines = start_torchrun(2, "engine.train", *FLAGS, "--steps", "100000", "--out", str(run), launcher=forwards)
    until_logged(run, 3)
    machines[1].send_signal(signal.SIGUSR1)
    found = ends(machines, within=120)
    said = [line for _, errors in found for line in errors.splitlines() if "resume with" in line]
    assert len(said) == 1, found
    stopped = max(int(path.stem.removeprefix("step_")) for path in run.glob("checkpoints/step_*"))
    assert f"stopped at step {stopped} of 100000" in said[0]


@pytest.mark.slow
def test_a_restarted_job_begins_anew(tmp_path: Path) -> None:
    """The launcher's store outlives the attempt that failed, and what that has written there."""
    script = tmp_path / "script.py"
    script.write_text(RESTARTED)
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, *agent], env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert sorted(found.stdout.split()) == ["attempt1rank0", "attempt1rank1"]


@pytest.mark.slow
def test_two_machines_train_the_run_of_one(whole: Path, tmp_path: Path) -> None:
    found = ends(start_torchrun(2, "engine.train", *FLAGS, "--out", str(tmp_path / "run")), within=300)
    assert [status for status, _ in found] == [0, 0], found
    assert same_run(tmp_path / "run", whole)


def until_logged(run: Path, steps: int) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= steps:
            return
        time.sleep(0.05)
    raise AssertionError(f"{run} has not come to step {steps}")


@pytest.mark.slow
def test_kills_at_random_moments(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times, kill -9 of one of two ranks at any moment from its start on, and a resumed run."""
    # Without a launcher, one that was killed before it joined is missed for so long.
    monkeypatch.setenv("GFMN_JOIN_TIMEOUT", "20")
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, kills, runs = random.Random(seed), 0, 0

    def attempt(run: Path, wait: float | None) -> bool:
        """Whether the run came to its end before one of its ranks was killed."""
        begun = (run / "config.json").exists()
        job = start_job(2, ["-m", "engine.train", *(["--resume"] if begun else FLAGS), "--out", str(run)])
        if wait is not None:
            end = time.monotonic() + wait
            while time.monotonic() < end and any(process.poll() is None for process in job):
                time.sleep(0.02)
            draw.choice(job).kill()
        found = ends(job, within=120)
        assert all(status in (0, 2, -signal.SIGKILL) for status, _ in found), found
        return all(status == 0 for status, _ in found)

    before = time.monotonic()
    assert attempt(tmp_path / "timed", None)
    longest = time.monotonic() - before
    while kills < 20:
        run, runs = tmp_path / f"run {runs}", runs + 1
        while not attempt(run, draw.uniform(0, longest) if kills < 20 else None):
            kills += 1
        assert same_run(run, whole)
        shutil.rmtree(run)
