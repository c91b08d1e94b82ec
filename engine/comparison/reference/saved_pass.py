"""The state of an interrupted statistics pass, in a file."""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.comparison.reference.protocols import ReferenceCollector
from engine.support.errors import InputError
from engine.support.files import read_tensors, save_safetensors
from engine.training.ranks import ALONE, Ranks

_FORMAT = "gfmn-partial-2"

log = logging.getLogger("gfmn")


@dataclass(kw_only=True)
class SavedPass:
    """Where one process keeps the state of its pass, and what makes that state its own.

    Args:
        path: the file of the state, removed once the target is safe; None keeps nothing.
        of: what the state belongs to; a file that belongs to something else is ignored and replaced.
    """

    path: Path | None = None
    of: dict[str, str] = field(default_factory=dict)

    def restore(self, collector: ReferenceCollector[Any]) -> tuple[int, list[str]]:
        """Fill the collector; returns (position, lines on skipped images): (0, []) if there is nothing to resume.

        A file that is damaged, or of another dataset, extractor, precision or batch size, only costs a line.
        """
        if self.path is None or not self.path.exists():
            return 0, []
        try:
            tensors, metadata = read_tensors(self.path)
            if metadata.get("format") != _FORMAT or json.loads(metadata["of"]) != self.of:
                log.info("%s: an interrupted pass over something else, which is replaced", self.path)
                return 0, []
            position = int(metadata["position"])
            skipped = [str(line) for line in json.loads(metadata["skipped"])]
            collector.restore(tensors)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            log.info("%s: not readable, so the pass begins anew", self.path)
            return 0, []
        log.info("resuming after %d images: %s", collector.count, self.path)
        return position, skipped

    def save(self, collector: ReferenceCollector[Any], position: int, skipped: Sequence[str]) -> None:
        """Write the state between two batches, whole or not at all; where that fails, the pass continues without."""
        if self.path is None:
            return
        metadata = {
            "format": _FORMAT,
            "of": json.dumps(self.of, sort_keys=True),
            "position": str(position),
            "skipped": json.dumps(list(skipped)),
        }
        try:
            save_safetensors(self.path, collector.state(), metadata)
        except InputError as error:
            log.warning("%s; if this pass is interrupted, it begins anew", error)
            self.path = None


def own_path(path: Path, ranks: Ranks = ALONE) -> Path:
    """`path`, or on further ranks the name beside it that stands for their share."""
    return path if ranks.rank == 0 else path.with_name(f"{path.name}.{ranks.rank}")


def partial_path(path: Path, ranks: Ranks = ALONE) -> Path:
    """Where this rank keeps the state of a pass whose result comes to `path`: beside it."""
    own = own_path(path, ranks)
    return own.with_name(f"{own.name}.partial")


def forget_partials(path: Path, ranks: Ranks = ALONE) -> None:
    """Remove the state of a pass whose result is safe, on every rank once rank 0 has written it.

    Rank 0 also removes what jobs of more ranks left.
    """
    ranks.meet("written", "")
    partial_path(path, ranks).unlink(missing_ok=True)
    if ranks.rank == 0:
        for left in path.parent.glob(f"{glob.escape(path.name)}.[0-9]*.partial"):
            left.unlink(missing_ok=True)
