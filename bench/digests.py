"""What a change of the code must not change: digests of five short runs, bit for bit.

python -m bench.digests                  # prints a digest of metrics, generator and target for each run
python -m bench.digests --only digits    # one of them

Run it before and after a change that should only move code, on the same machine with nothing cached in between, and
compare what the two print. The bits depend on the machine and on the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from engine.configuration.command import Parser, run_command

_STEPS = 40
_TIMES = ("images_per_second", "peak_memory_bytes")
RUNS: dict[str, list[str]] = {
    "digits": [],
    "amp": ["--amp", "--fused-ama"],
    "moving-average": ["--no-fused-ama", "--averager", "ma"],
    "paper-networks": [
        *("--extractor", "vgg19+resnet18", "--weights", "random", "--batch-size", "48", "--chunk-size", "16"),
        *("--recompute", "stages", "--recompute-generator"),
    ],
    "batch-statistics": ["--averager", "none", "--extractor-bn", "batch"],
}


def digest_of_metrics(path: Path) -> str:
    """SHA-256 of a run's `metrics.jsonl` without the entries that are times or memory."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{name: value for name, value in line.items() if name not in _TIMES} for line in lines]
    return hashlib.sha256("".join(json.dumps(line) + "\n" for line in kept).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(flags: list[str], folder: Path) -> dict[str, str]:
    """Train for a few steps in `folder`, which also holds the cache of extractors and targets; returns the digests."""
    out = folder / "run"
    command = [
        sys.executable,
        "-m",
        "engine.train",
        *flags,
        "--steps",
        str(_STEPS),
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "GFMN_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
    (target,) = (folder / "cache" / "targets").glob("*.safetensors")
    return {
        "metrics.jsonl": digest_of_metrics(out / "metrics.jsonl"),
        "generator.safetensors": digest_of_file(out / "generator.safetensors"),
        "target.safetensors": digest_of_file(target),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run and print the digests, one run after the other."""
    parser = Parser(prog="python -m bench.digests", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(RUNS), help="this run alone")
    arguments = parser.parse_args(argv)
    for name, flags in RUNS.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                for file, digest in run(flags, Path(folder)).items():
                    print(f"{name:17} {file:22} {digest[:32]}", flush=True)


if __name__ == "__main__":
    run_command(main)
