"""`python -m bench.gpu` (`make gpu`): everything that needs a CUDA device, in one go and one JSON file, in ten minutes.

First what has to be right: every test of the kernels and those marked `requires_gpu`, on the device. Then what a step
consists of, and the benchmarks. Each is a process of its own with a limit of its own; one that fails or takes too long
is reported as such, keeps the rows that it had, and doesn't stop the others. The file is written again after each.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.commands import interruptible
from bench.rows import environment, table
from engine.configuration.command import Parser, output_file, run_command
from engine.support.files import write_atomically

BUDGET_S = 600
_OUTPUT_LINES = 40
_ON_CUDA = ("--device", "cuda")
# A few processes, so that kernels are compiled side by side.
_TESTS = ("pytest", "--numprocesses", "4", "--durations", "5")


@dataclass(frozen=True)
class Job:
    """A command: `python -m <arguments>`; a benchmark writes its rows with `--json`."""

    name: str
    arguments: tuple[str, ...]
    limit_s: int
    rows: bool = True


# In the order in which a first run on a device should fail. All limits together are at most `BUDGET_S`.
JOBS = (
    # On their own: without a device these tests would choose Triton's interpreter for a whole process. Tests of the
    # other backends compute nothing on a device.
    Job("kernel tests", (*_TESTS, "--dist", "load", "tests/kernels", "-k", "triton"), 90, rows=False),
    Job("tests", (*_TESTS, "-m", "requires_gpu and not slow", "tests/engine", "tests/pipelines"), 100, rows=False),
    Job("step profile", ("bench.step_profile", "--batch-sizes", "64", "1024"), 40),
    Job("kernels", ("bench.kernels", *_ON_CUDA, "--dtypes", "bfloat16"), 100),
    Job("kernels, step", ("bench.kernels", "--step", "--repetitions", "5", *_ON_CUDA), 30),
    Job(
        "memory",
        ("bench.memory", *_ON_CUDA, "--batch-sizes", "64", "1024", "4096", "--variants", "ours", "ours --amp",
         "--measure-up-to", "60GiB", "--no-capacity"),
        75,
    ),
    Job(
        "data",
        ("bench.data", *_ON_CUDA, "--only", "jpeg", "pass", "--jpegs", "2000", "--jpeg-repetitions", "3",
         "--pass-repetitions", "3"),
        45,
    ),
    Job("throughput", ("bench.throughput", *_ON_CUDA), 110),
)  # fmt: skip


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    """Run a job; returns status ("passed", "failed" or "timed out"), seconds, last lines of output, rows.

    What it has started is killed with it when its time is over, and whatever of that is left when it has ended.
    """
    stem = job.name.replace(", ", "_").replace(" ", "_")
    rows, printed = folder / f"{stem}.json", folder / f"{stem}.txt"
    command = [sys.executable, "-m", *job.arguments, *(("--json", str(rows)) if job.rows else ())]
    begun = time.perf_counter()
    # Not a pipe, which lasts as long as the last process that holds it.
    with printed.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        status = "passed" if process.wait(job.limit_s) == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "timed out"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {
        "status": status,
        "command": " ".join(["python", *command[1:]]),
        "seconds": round(time.perf_counter() - begun, 1),
        "output": printed.read_text(errors="replace").splitlines()[-_OUTPUT_LINES:],
        "rows": json.loads(rows.read_text()) if rows.exists() else None,
    }


def _free(name: str) -> Path:
    """A file of bench/results/ that is not there yet, numbered if it has to be."""
    folder = Path(__file__).parent / "results"
    names = itertools.chain((name,), (f"{name}_{number}" for number in itertools.count(2)))
    return next(file for file in (folder / f"{free}.json" for free in names) if not file.exists())


def main(argv: Sequence[str] | None = None) -> None:
    """Run all jobs, write everything after each, print how each ended. Exits with 1 unless all passed."""
    parser = Parser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = _free(f"gpu_{time.strftime('%Y-%m-%d')}")
    parser.add_argument("--json", type=output_file, metavar="FILE", default=default, help="default: %(default)s")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run")
        return
    where = environment("cuda")
    results: dict[str, dict[str, Any]] = {}
    with interruptible(), tempfile.TemporaryDirectory() as folder:
        for job in JOBS:
            print(f"{job.name} …", file=sys.stderr, flush=True)
            results[job.name] = run_job(job, Path(folder))
            measured = {"environment": where, "results": results}
            write_atomically(args.json, (json.dumps(measured, indent=1) + "\n").encode())
    lines = [[name, result["status"], f"{result['seconds']:.0f}"] for name, result in results.items()]
    print(table(("what", "status", "seconds"), lines))
    print(f"written: {args.json}")
    if any(result["status"] != "passed" for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
