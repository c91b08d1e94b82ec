"""Training runs that are resumed after an interruption, and not trained again once they are finished."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.commands import Usage, check, run_module
from engine.support.errors import InputError
from engine.support.files import write_atomically
from engine.training.run_folder import RunFolder


def train(flags: Sequence[str], folder: Path, threads: int | None = None) -> Usage:
    """What `engine.train FLAGS… --out FOLDER` used, in all its pieces.

    Beside the folder lies `FOLDER.json`, which has the flags, what every piece used, and whether the run is finished.
    A piece is noted as None before it begins. If one was killed that remains, and the CPU seconds are not known.

    Raises InputError for a folder that was trained with other flags, and for training that fails.
    """
    record = folder.with_name(folder.name + ".json")
    known: dict[str, Any] = {"flags": list(flags), "used": [], "done": False}
    if record.exists():
        known = json.loads(record.read_text())
    if known["flags"] != list(flags):
        raise InputError("runs", f"{folder} was run with other flags; delete it or choose another folder")
    if not known["done"]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        known["used"].append(None)
        _write(record, known)
        resumed = RunFolder(folder).config.exists()
        own = ["--resume", "--steps", flags[list(flags).index("--steps") + 1]] if resumed else list(flags)
        print(f"python -m engine.train {' '.join(own)} --out {folder}", file=sys.stderr, flush=True)
        ended = run_module("engine.train", [*own, "--out", str(folder)], threads=threads)
        known["used"][-1] = asdict(ended.usage)
        known["done"] = ended.status == 0
        _write(record, known)
        check(ended, f"{folder}: python -m engine.train")
    pieces = [Usage(0.0, None, 0.0) if piece is None else Usage(**piece) for piece in known["used"]]
    return sum(pieces[1:], pieces[0])


def _write(record: Path, known: dict[str, Any]) -> None:
    write_atomically(record, (json.dumps(known, indent=1) + "\n").encode())
