"""`engine.train` in several processes: one run folder, one line on errors, and the same run on any number of them."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.jobs import ends, start_job, start_ranks
from helpers.marks import slow
from helpers.runs import metrics, same_run

from engine import train

pytestmark = pytest.mark.usefixtures("own_cache")

SMALL = [
    *("--preset", "digits", "--device", "cpu", "--kernels", "reference", "--weights", "random", "--batch-size", "6"),
    *(
        "--nz",
        "4",
        "--averager",
        "ma",
        "--lr",
        "1e-6",
        "--log-every",
        "1",
        "--sample-every",
        "1000",
        "--checkpoint-every",
        "4",
    ),
]
STOPS = (signal.SIGTERM, slow(signal.SIGUSR1))


def train_on(size: int, *flags: object) -> list[tuple[int, str]]:
    return ends(start_job(size, ["-m", "engine.train", *map(str, flags)]))


def succeeds(size: int, *flags: object) -> None:
    for status, errors in train_on(size, *flags):
        assert status == 0, errors


def error_lines(found: Sequence[tuple[int, str]]) -> list[str]:
    return [line for _, errors in found for line in errors.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, own_cache) -> Path:
    """Twelve steps of one process; it leaves the target in the cache, where the jobs find it."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train.main([*SMALL, "--steps", "12", "--out", str(run)])
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, alone: Path) -> Path:
    """The same on two ranks."""
    run = tmp_path_factory.mktemp("two") / "run"
    succeeds(2, *SMALL, "--steps", 12, "--out", run)
    return run


def close(one: Path, other: Path) -> None:
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


def test_two_ranks_train_the_run_of_one(alone: Path, two: Path) -> None:
    close(two, alone)
    assert {path.name for path in two.iterdir()} == {path.name for path in alone.iterdir()}
    assert [json.loads(line)["step"] for line in (two / "metrics.jsonl").read_text().splitlines()] == [*range(1, 13)]


@pytest.mark.slow
def test_resume_on_another_number_of_ranks(two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeeds(2, *SMALL, "--steps", 4, "--out", run)
    train.main(["--resume", "--steps", "6", "--out", str(run)])
    succeeds(3, "--resume", "--steps", 9, "--out", run)
    succeeds(2, "--resume", "--steps", 12, "--out", run)
    close(run, two)


@pytest.mark.parametrize("sent", STOPS, ids=lambda sent: sent.name)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(sent: signal.Signals, two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_job(2, ["-m", "engine.train", *SMALL, "--steps", "100000", "--out", str(run)])
    until_steps(run, 3)
    job[1].send_signal(sent)
    found = ends(job, within=60)
    assert {status for status, _ in found} == {128 + sent}
    said = [line for _, errors in found for line in errors.splitlines() if "resume with" in line]
    assert len(said) == 1
    stopped = len(metrics(run))
    assert list((run / "checkpoints").glob(f"step_{stopped:08d}.safetensors"))


def until_steps(run: Path, steps: int) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        log = run / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError(f"{run} has not come to step {steps}")


@pytest.mark.parametrize("victim", [slow(0), 1])
def test_a_killed_rank_ends_all_and_nothing_is_lost(victim: int, two: Path, tmp_path: Path) -> None:
    run, draw = tmp_path / "run", random.Random(victim)
    job = start_job(2, ["-m", "engine.train", *SMALL, "--steps", "12", "--out", str(run)])
    until_steps(run, draw.randint(1, 8))
    job[victim].kill()
    killed = time.monotonic()
    found = ends(job, within=30)
    assert time.monotonic() - killed < 30
    assert found[1 - victim][0] != 0
    assert len(error_lines(found)) <= 1
    succeeds(2, "--resume", "--out", run)
    assert same_run(run, two)


@pytest.mark.slow
def test_nan_on_all_is_one_line(tmp_path: Path, alone: Path) -> None:
    found = train_on(2, *SMALL, "--lr", "1e30", "--steps", 50, "--out", tmp_path / "run")
    assert all(status != 0 for status, _ in found)
    (line,) = error_lines(found)
    assert "NaN or infinite" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch-size", "2"], "--batch-size"),
        slow(["--extractor-bn", "batch"], "--extractor-bn"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_line(flags: list[str], named: str, tmp_path: Path, alone: Path) -> None:
    found = train_on(3, *SMALL, *flags, "--steps", 2, "--out", tmp_path / "run")
    assert all(status != 0 for status, _ in found)
    (line,) = error_lines(found)
    assert named in line
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_says_so_once(two: Path, tmp_path: Path) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    (run / "loss.png").unlink()
    found = train_on(2, "--resume", "--out", run)
    assert [status for status, _ in found] == [0, 0]
    assert [errors.count("is finished, all 12 steps") for _, errors in found] == [1, 0]
    assert (run / "loss.png").read_bytes() == (two / "loss.png").read_bytes()


def test_ranks_with_other_flags_are_refused(tmp_path: Path, alone: Path) -> None:
    own = ["-m", "engine.train", *SMALL, "--steps", "2", "--out", str(tmp_path / "run")]
    found = ends(start_ranks([own, [*own, "--lr", "0.5"]]))
    (line,) = error_lines(found)
    assert "process 1 was started otherwise than process 0, with lr 0.5" in line
