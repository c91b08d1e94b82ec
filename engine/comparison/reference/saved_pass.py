"""The state of an interrupted statistics pass, in a file."""

from __future__ import annotations

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

    def remove(self) -> None:
        """The reference is safe: the state is not needed any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def forget_partial(partial: str | Path | None, ranks: Ranks = ALONE) -> None:
    """Remove the state of a pass whose result is safe, on every rank once rank 0 has written it."""
    ranks.meet("written", "")
    SavedPass(path=None if partial is None else Path(partial)).remove()
