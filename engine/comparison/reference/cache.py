"""References that are kept for the runs to come, by their fingerprint."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

from engine.comparison.reference.protocols import Kind, Reference
from engine.comparison.reference.saved_pass import forget_partial
from engine.comparison.reference.statistics_pass import compute_reference, fingerprint, reference_loader
from engine.representation.extractor import Extractor
from engine.support.errors import InputError
from engine.support.files import locked, write_atomically
from pipelines import ImageDataset, cache_is_kept, cached

log = logging.getLogger("gfmn")

R = TypeVar("R", bound=Reference)


def cached_reference(
    kind: Kind[R],
    extractor: Extractor,
    dataset: ImageDataset,
    *,
    amp_dtype: torch.dtype | None = None,
    kernels: str = "auto",
    batch_size: int = 64,
    seed: int = 0,
    loader: str = "auto",
) -> R:
    """`compute_reference`, or its result from the cache folder if it was computed before from exactly the same things.

    An interrupted computation resumes from its last saved state. Of several processes that want the same reference, one
    computes it and the others wait for it.
    """
    images = reference_loader(extractor, dataset, batch_size=batch_size, seed=seed, loader=loader)
    expected = fingerprint(kind, extractor, images, amp_dtype)
    path = cache_path(expected)
    if (found := _from_cache(kind, path, expected)) is not None:
        return found
    with exclusive(path):
        if (found := _from_cache(kind, path, expected)) is not None:
            return found
        partial = path.with_suffix(".partial") if cache_is_kept() else None
        made = compute_reference(kind, extractor, images, amp_dtype=amp_dtype, kernels=kernels, partial=partial)
        put_in_cache(made, fingerprint(kind, extractor, images, amp_dtype))
        forget_partial(partial)
    return made


def cache_path(entries: dict[str, str]) -> Path:
    """Where the reference with this fingerprint is kept; another fingerprint has another path."""
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:24]
    return cached("targets", f"{digest}.safetensors")


def put_in_cache(reference: Reference, now: dict[str, str]) -> None:
    """Keep a reference for the runs to come, unless the dataset has changed: its fingerprint is `now` another one."""
    if reference.fingerprint is None or now != reference.fingerprint:
        log.warning("the dataset changed while it was read; this target is not kept for other runs")
        return
    try:
        reference.save(cache_path(reference.fingerprint))
    except InputError as error:
        log.warning("%s; this target is not kept for other runs", error)


def _from_cache(kind: Kind[R], path: Path, expected: dict[str, str]) -> R | None:
    if not path.exists():
        return None
    try:
        found = kind.load(path, expected)
    except InputError:
        log.warning("%s: damaged, so the target is computed again", path)
        path.unlink(missing_ok=True)
        return None
    log.info("target: cached in %s", path)
    return found


def write_bad_images(path: str | Path, reference: Reference) -> None:
    """List the images that a reference leaves out in a text file, `file: reason` a line; no file if there are none."""
    path = Path(path)
    if reference.skipped:
        write_atomically(path, "".join(f"{line}\n" for line in reference.skipped).encode())
        log.warning("%d bad images were left out: %s", len(reference.skipped), path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time works at `path`; the others wait. A kill frees it, and leaves nothing half-written.

    Inside, what killed writes of `path` and of its partial state left behind is removed.
    """
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, busy=lambda: log.info("%s: another process is at it; waiting", path)):
        for name in (path.name, path.with_suffix(".partial").name):
            for leftover in path.parent.glob(f".{glob.escape(name)}.*.tmp"):
                leftover.unlink(missing_ok=True)
        yield
