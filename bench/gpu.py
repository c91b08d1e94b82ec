"""`python -m bench.gpu` (`make gpu`): everything that needs a CUDA device, in one go and one JSON file, in ten minutes.

The tests marked `requires_gpu`, DALI decoding on the device among them, then all benchmarks. Each is a process of its
own with a limit of its own; one that fails or takes too long is reported as such and doesn't stop the others.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.rows import environment, table
from engine.configuration.command import Parser, output_file, run_command
from engine.support.files import write_atomically

_OUTPUT_LINES = 40


@dataclass(frozen=True)
class Job:
    """A command: `python -m <arguments>`; a benchmark writes its rows with `--json`."""

    name: str
    arguments: tuple[str, ...]
    limit_s: int
    rows: bool = True


JOBS = (
    # Tests of the kernels choose Triton's interpreter for a whole process unless they are told not to.
    Job("tests", ("pytest", "-m", "requires_gpu", "tests/engine", "tests/pipelines"), 120, rows=False),
    Job("kernel tests", ("pytest", "-m", "requires_gpu", "tests/kernels"), 60, rows=False),
    Job("kernels", ("bench.kernels", "--device", "cuda"), 120),
    Job("kernels, step", ("bench.kernels", "--step", "--device", "cuda"), 60),
    Job("throughput", ("bench.throughput", "--device", "cuda"), 90),
    Job("memory", ("bench.memory", "--device", "cuda"), 90),
    Job("data", ("bench.data", "--quick"), 60),
)


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    """Run a job; returns status ("passed", "failed" or "timed out"), seconds, last lines of output, rows."""
    rows = folder / f"{job.name.replace(', ', '_').replace(' ', '_')}.json"
    command = [sys.executable, "-m", *job.arguments, *(("--json", str(rows)) if job.rows else ())]
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=job.limit_s)
        status, output = ("passed" if done.returncode == 0 else "failed"), done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status, output = "timed out", (error.stdout or b"").decode(errors="replace")
    return {
        "status": status,
        "command": " ".join(["python", *command[1:]]),
        "seconds": round(time.perf_counter() - begun, 1),
        "output": output.splitlines()[-_OUTPUT_LINES:],
        "rows": json.loads(rows.read_text()) if rows.exists() else None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run all jobs, print how each ended, write everything. Exits with 1 unless all passed."""
    parser = Parser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("bench/results") / f"gpu_{time.strftime('%Y-%m-%d')}.json"
    parser.add_argument("--json", type=output_file, metavar="FILE", default=default, help="default: %(default)s")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run")
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for job in JOBS:
            print(f"{job.name} …", file=sys.stderr, flush=True)
            results[job.name] = run_job(job, Path(folder))
    measured = {"environment": environment(), "results": results}
    write_atomically(args.json, (json.dumps(measured, indent=1) + "\n").encode())
    lines = [[name, result["status"], f"{result['seconds']:.0f}"] for name, result in results.items()]
    print(table(("what", "status", "seconds"), lines))
    print(f"written: {args.json}")
    if any(result["status"] != "passed" for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
