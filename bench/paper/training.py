"""Training runs that are resumed after an interruption, and not trained again once they are finished."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.commands import RunFailed, Usage, check, run_module
from engine.configuration.config import Config
from engine.support.errors import InputError
from engine.support.files import write_atomically
from engine.training.run_folder import RunFolder


def configured(flags: Sequence[str]) -> Config:
    """What `engine.train FLAGS…` trains."""
    # Here, because the front door imports all settings' flags.
    from engine.configuration.flags import given_flags
    from engine.train import parser

    arguments = parser().parse_args(list(flags))
    return Config.build(arguments.preset, given_flags(arguments))


_OF_MACHINES = ("data", "device", "threads", "weights")


def settings_digest(flags: Sequence[str]) -> str:
    """Of all settings, a preset's values among them, which the flags don't say: twelve hexadecimal digits. Where files
    lie, and what the run is computed on, are none of them."""
    values = {name: value for name, value in configured(flags).flat().items() if name not in _OF_MACHINES}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def check_same(what: Path, known: object, wanted: object) -> None:
    """InputError for a run, or what was found with one, that has other flags or settings than are `wanted`."""
    if known != wanted:
        raise InputError(
            "runs", f"{what} was run with other flags, or its preset had other values; delete it or give another folder"
        )


def check_kept(name: str, settings: str | None, flags: Sequence[str]) -> None:
    """InputError if a row of the run `name`, whose digest is `settings`, is of other ones than `flags` have now."""
    if settings != settings_digest(flags):
        raise InputError(
            "json", f"its row of {name} is of other settings than {name} has now; delete the row or give another file"
        )


def train(flags: Sequence[str], folder: Path, threads: int | None = None, *, retry: bool = True) -> Usage:
    """What `engine.train FLAGS… --out FOLDER` used, in all its pieces.

    Beside the folder lies `FOLDER.json`, which has the flags, a digest of the settings, what every piece used, whether
    the run is finished, and why the engine refused to go on, if it did. A piece is noted as None before it begins. If
    one was killed that remains, and the CPU seconds are not known. The file means nothing once the folder was deleted.

    Raises InputError for a folder that was trained with other flags or settings, and RunFailed for training that fails;
    without `retry` at once for a run that the engine refused before.
    """
    record = folder.with_name(folder.name + ".json")
    asked = {"flags": list(flags), "settings": settings_digest(flags)}
    known: dict[str, Any] = {**asked, "used": [], "done": False}
    if record.exists() and folder.exists():
        known = json.loads(record.read_text())
    check_same(folder, {key: known.get(key) for key in asked}, asked)
    if known.get("failed") and not retry:
        raise RunFailed(known["failed"])
    if not known["done"]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        known.pop("failed", None)
        known["used"].append(None)
        _write(record, known)
        resumed = RunFolder(folder).config.exists()
        own = ["--resume", "--steps", flags[list(flags).index("--steps") + 1]] if resumed else list(flags)
        print(f"python -m engine.train {' '.join(own)} --out {folder}", file=sys.stderr, flush=True)
        ended = run_module("engine.train", [*own, "--out", str(folder)], threads=threads)
        known["used"][-1] = asdict(ended.usage)
        known["done"] = ended.status == 0
        _write(record, known)
        try:
            check(ended, f"{folder}: python -m engine.train")
        except RunFailed as error:
            if error.refused:
                _write(record, {**known, "failed": str(error)})
            raise
    pieces = [Usage(0.0, None, 0.0) if piece is None else Usage(**piece) for piece in known["used"]]
    return sum(pieces[1:], pieces[0])


def _write(record: Path, known: dict[str, Any]) -> None:
    write_atomically(record, (json.dumps(known, indent=1) + "\n").encode())
