"""References that are kept for the runs to come, by their fingerprint."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from engine.comparison.reference.protocols import Kind, Reference
from engine.comparison.reference.saved_pass import forget_partials, own_path, partial_path
from engine.comparison.reference.statistics_pass import compute_reference, fingerprint
from engine.representation.extractor import Extractor
from engine.support.errors import InputError
from engine.support.files import leftovers, locked, write_atomically
from engine.training.ranks import ALONE, Ranks
from pipelines import ImageLoader, cache_is_kept, cached

log = logging.getLogger("gfmn")

R = TypeVar("R", bound=Reference)


def cached_reference(
    kind: Kind[R],
    extractor: Extractor,
    images: ImageLoader,
    *,
    amp_dtype: torch.dtype | None = None,
    kernels: str = "auto",
    ranks: Ranks = ALONE,
) -> R:
    """`compute_reference`, or its result from the cache folder if it was computed before from exactly the same things.

    An interrupted computation resumes from its last saved state. Of several jobs that want the same reference, one
    computes it and the others wait for it. All ranks of a job share the pass, and get rank 0's result, bit for bit.

    Args:
        images: from `reference_loader`, this rank's shard of them.

    The other arguments, and what is raised, are `compute_reference`'s.
    """
    # Rank 0 first: it digests, and the others find that in the cache.
    expected = ranks.first("digested", lambda: fingerprint(kind, extractor, images, amp_dtype))
    path = cache_path(expected)

    def find() -> R | None:
        return _from_cache(kind, path, expected)

    def make(partial: Path) -> R:
        made = compute_reference(
            kind,
            extractor,
            images,
            amp_dtype=amp_dtype,
            kernels=kernels,
            partial=partial if cache_is_kept() else None,
            ranks=ranks,
        )
        if ranks.rank == 0:
            put_in_cache(made, fingerprint(kind, extractor, images, amp_dtype))
        return made

    found = find() if ranks.rank == 0 else None  # before it is locked: a cache may be read-only
    if not any(ranks.meet("cached", found is not None)):
        with job_at(path, ranks):
            found = found_or_made(path, find, make, ranks)
    return handed_out(kind, found, ranks)


@contextlib.contextmanager
def job_at(path: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """One job at a time, all its ranks, works at `path` (see `exclusive`)."""
    with contextlib.ExitStack() as alone:
        # Rank 0 first: two jobs could wait for each other's ranks.
        ranks.first("alone", lambda: alone.enter_context(exclusive(own_path(path, ranks), ranks)))
        yield


def found_or_made(
    path: Path, find: Callable[[], R | None], make: Callable[[Path], R], ranks: Ranks = ALONE
) -> R | None:
    """On rank 0 what `find()` gives, or else what `make(partial)` puts at `path`; on others it is of no interest.

    To be called inside `job_at`; all ranks make. Each keeps what a later job resumes from in its `partial` beside
    `path`, which is removed once the result is there.
    """
    found = find() if ranks.rank == 0 else None
    if not any(ranks.meet("found", found is not None)):
        found = make(partial_path(path, ranks))
    forget_partials(path, ranks)
    return found


def handed_out(kind: Kind[R], reference: R | None, ranks: Ranks = ALONE) -> R:
    """Rank 0's `reference` on all ranks, the same bits; the others' argument is of no interest."""
    if ranks.size == 1:
        assert reference is not None
        return reference
    with tempfile.TemporaryDirectory(prefix="gfmn-") as folder:
        file = Path(folder) / "reference.safetensors"
        if ranks.rank == 0:
            assert reference is not None
            reference.save(file)
            ranks.from_first(file.read_bytes())
            return reference
        file.write_bytes(ranks.from_first(b""))
        return kind.load(file)


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
def exclusive(path: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """One process at a time works at `path`; the others wait. A kill frees it, and leaves nothing half-written.

    Inside, what killed writes of `path` and of its partial state left behind is removed. Who waits for another job
    waits no longer when another one of the own `ranks` has failed, or was told to stop (see `Ranks.check`).
    """
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, lambda: log.info("%s: another process is at it; waiting", path), ranks.check):
        partials = (path.with_suffix(".partial").name, f"{path.name}.partial")  # of pretraining, and of a pass
        names = (glob.escape(name) for name in (path.name, *partials))
        for leftover in leftovers(path.parent, *names):
            leftover.unlink(missing_ok=True)
        yield
