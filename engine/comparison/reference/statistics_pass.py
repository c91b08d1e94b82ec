"""The target: moments of the whole real dataset, computed once, cached by fingerprint, and resumed after a kill.

A pass is one sequence of batches. Its state is (position in the sequence, count, mean, M2) in float64, and each batch
is merged into it in turn, so a pass that goes on from a saved state ends in the same bits as one never stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import kernels as kernel_backends
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import FeatureOrder, target_fingerprint
from engine.comparison.reference.collector import DatasetCollector
from engine.configuration.command import Interrupted
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.support.errors import InputError
from engine.support.files import save_safetensors, write_atomically
from engine.training.ranks import ALONE, EndedElsewhere, Ranks
from engine.training.stopping import StopRequest
from pipelines import DataError, ImageDataset, ImageLoader, cache_folder

SAVE_EVERY = 30.0
"""Seconds between two saves of a pass's state."""
LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""
_PARTIAL_FORMAT = "gfmn-partial-1"

log = logging.getLogger("gfmn")


def target_loader(
    extractor: Extractor,
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    loader: str = "auto",
    shard: int = 0,
    num_shards: int = 1,
) -> ImageLoader:
    """The images in the order of a target pass: shuffled with `seed` where batch statistics make minibatches matter.

    Raises InputError for several shards with batch statistics: their minibatches would be others than one process's.
    """
    if extractor.batch_statistics and num_shards > 1:
        raise InputError("--extractor-bn: batch statistics depend on the minibatches; run this in one process")
    return ImageLoader(
        dataset,
        batch_size,
        device=extractor.device,
        backend=loader,
        shuffle=extractor.batch_statistics,
        seed=seed,
        shard=shard,
        num_shards=num_shards,
    )


def fingerprint(extractor: Extractor, images: ImageLoader, amp_dtype: torch.dtype | None) -> dict[str, str]:
    """Everything that decides a target's values: extractor, precision, images, and who decodes them.

    Batch statistics (`--extractor-bn batch`) depend on the minibatches too, so there their size and seed count.
    """
    entries = {f"data_{name}": str(value) for name, value in images.fingerprint().items()}
    if extractor.batch_statistics:
        entries["minibatches"] = f"{images.batch_size} shuffled with seed {images.seed}"
    return {**target_fingerprint(extractor, amp_dtype), **entries}


@dataclass(kw_only=True)
class Pass:
    """Where one process keeps the state of its pass, and what makes that state its own.

    Args:
        path: the file of the state, removed once the target is safe; None keeps nothing.
        of: what the state belongs to; a file that belongs to something else is ignored and replaced.
    """

    path: Path | None = None
    of: dict[str, str] = field(default_factory=dict)

    def restore(self, collector: DatasetCollector) -> tuple[int, list[str]]:
        """Fill the collector; returns (position, lines on skipped images): (0, []) if there is nothing to go on from.

        A file that is damaged, or of another dataset, extractor, precision or batch size, only costs a line.
        """
        if self.path is None or not self.path.exists():
            return 0, []
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _PARTIAL_FORMAT or json.loads(metadata["of"]) != self.of:
                    log.info("%s: an interrupted pass over something else, which is replaced", self.path)
                    return 0, []
                mean, m2 = file.get_tensor("mean"), file.get_tensor("m2")
                position, count = int(metadata["position"]), int(metadata["count"])
                skipped = [str(line) for line in json.loads(metadata["skipped"])]
            if mean.shape != collector.mean.shape or m2.shape != mean.shape or mean.dtype != torch.float64:
                raise ValueError("other features")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            log.info("%s: not readable, so the pass begins anew", self.path)
            return 0, []
        collector.mean.copy_(mean)
        collector.m2.copy_(m2)
        collector.count = count
        log.info("going on after %d images: %s", count, self.path)
        return position, skipped

    def save(self, collector: DatasetCollector, position: int, skipped: Sequence[str]) -> None:
        """Write the state between two batches, whole or not at all; where that fails, the pass goes on without."""
        if self.path is None:
            return
        metadata = {
            "format": _PARTIAL_FORMAT,
            "of": json.dumps(self.of, sort_keys=True),
            "position": str(position),
            "count": str(collector.count),
            "skipped": json.dumps(list(skipped)),
        }
        try:
            save_safetensors(self.path, {"mean": collector.mean, "m2": collector.m2}, metadata)
        except InputError as error:
            log.warning("%s; if this pass is interrupted, it begins anew", error)
            self.path = None

    def remove(self) -> None:
        """The target is safe: the state is not needed any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def compute_target(
    extractor: Extractor,
    images: ImageLoader,
    *,
    amp_dtype: torch.dtype | None = None,
    kernels: str = "auto",
    progress: bool = True,
    partial: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> Moments:
    """Stream every image once through the extractor and accumulate the moments of all features in float64.

    With running statistics the result depends neither on the batch size, nor on the order, nor on the number of ranks,
    but for the last bits of the features themselves and rounding in float64. The same batches on the same machine give
    the same bits, interrupted or not.

    Args:
        extractor: frozen, on its device.
        images: the pass's loader, this rank's shard of it if there are several.
        amp_dtype: low precision of the extractor's arithmetic, None for its own.
        kernels: backend, see `kernels.select`.
        progress: a bar on a terminal, lines elsewhere.
        partial: file of the pass's state, written every `SAVE_EVERY` seconds and on Ctrl-C, and gone on from if it is
            there and fits. It stays: call `forget_partial` once the result is safe. None keeps nothing.
        ranks: the processes that share the dataset.

    Returns the target on rank 0 (moments merged in rank order); on other ranks an empty one.

    Raises InputError or DataError for unusable images, Interrupted after Ctrl-C, EndedElsewhere on other ranks' errors.
    """
    feature_pass = FeaturePass(extractor, dtype=amp_dtype)
    backend = kernel_backends.select(kernels, extractor.device, feature_pass.dtype)
    order = FeatureOrder(extractor.taps)
    entries = fingerprint(extractor, images, amp_dtype)
    shard = f"{images.shard} of {images.num_shards}"
    own = {**entries, "batch_size": str(images.batch_size), "shard": shard}
    state = Pass(path=None if partial is None else Path(partial), of=own)
    collector = DatasetCollector(feature_pass.prepared, order, backend, len(images.dataset))
    position, skipped = state.restore(collector)

    def all_skipped() -> list[str]:
        return _unique([*skipped, *map(str, images.bad_images)])

    saved = time.monotonic()
    with _Stop(ranks) as stop, _Progress(images, position, show=progress and ranks.rank == 0) as shown:
        try:
            for batch in _continued(images, position):
                feature_pass.collect(batch.images, collector)
                collector.end_batch()
                position = images.position
                shown.advance(len(batch.images))
                if stop.requested:
                    break
                if time.monotonic() >= saved + SAVE_EVERY:
                    state.save(collector, position, all_skipped())
                    saved = time.monotonic()
                ranks.check()
            else:
                position = len(images)
        except EndedElsewhere:
            state.save(collector, position, all_skipped())
            raise
        if stop.requested or ranks.size > 1:
            state.save(collector, position, all_skipped())
        if stop.requested and position < len(images):
            raise Interrupted(_how_to_go_on(collector.count, images, state))
        try:
            lists = ranks.meet("skipped", [collector.count, all_skipped()], lambda: stop.requested)
        except KeyboardInterrupt:
            raise Interrupted(_how_to_go_on(collector.count, images, state)) from None
    if not images.dataset.skip_bad_images and fingerprint(extractor, images, amp_dtype) != entries:
        raise DataError("the dataset changed while it was read, so its moments are of neither version; run this again")
    lines = _unique(line for _, lines in lists for line in lines)
    parts = ranks.gather(torch.stack((collector.mean, collector.m2)))
    total = Moments(0, torch.zeros_like(collector.mean), torch.zeros_like(collector.mean))
    for part, (count, _) in zip(parts, lists):
        total = total.merge(Moments(count, part[0], part[1]))
    if ranks.rank == 0 and total.count == 0:
        raise InputError(f"no image could be used, the first of {len(lines)} reasons: {(lines or ['no images'])[0]}")
    return Moments(total.count, order.to_public(total.mean), order.to_public(total.m2), entries, lines)


def forget_partial(partial: str | Path, ranks: Ranks = ALONE) -> None:
    """Remove the state of a pass whose result is safe, on every rank once rank 0 has written it."""
    ranks.meet("written", "")
    Pass(path=Path(partial)).remove()


def cached_target(
    extractor: Extractor,
    dataset: ImageDataset,
    *,
    amp_dtype: torch.dtype | None = None,
    kernels: str = "auto",
    batch_size: int = 64,
    seed: int = 0,
    loader: str = "auto",
) -> Moments:
    """`compute_target`, or its result from the cache folder if it was computed before from exactly the same things.

    An interrupted computation goes on from its last saved state. Of several processes that want the same target, one
    computes it and the others wait for it.
    """
    images = target_loader(extractor, dataset, batch_size=batch_size, seed=seed, loader=loader)
    expected = fingerprint(extractor, images, amp_dtype)
    path = cache_path(expected)
    partial = path.with_suffix(".partial")
    if (target := _from_cache(path, expected)) is not None:
        return target
    with exclusive(path):
        if (target := _from_cache(path, expected)) is not None:
            return target
        target = compute_target(extractor, images, amp_dtype=amp_dtype, kernels=kernels, partial=partial)
        put_in_cache(target, extractor, images, amp_dtype)
        forget_partial(partial)
    return target


def cache_path(entries: dict[str, str]) -> Path:
    """Where the target with this fingerprint is kept; another fingerprint has another path."""
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "targets" / f"{digest}.safetensors"


def put_in_cache(target: Moments, extractor: Extractor, images: ImageLoader, amp_dtype: torch.dtype | None) -> None:
    """Keep a target for the runs to come, unless the dataset has changed since its fingerprint was taken."""
    if target.fingerprint is None or fingerprint(extractor, images, amp_dtype) != target.fingerprint:
        log.warning("the dataset changed while it was read; this target is not kept for other runs")
        return
    try:
        target.save(cache_path(target.fingerprint))
    except InputError as error:
        log.warning("%s; this target is not kept for other runs", error)


def _from_cache(path: Path, expected: dict[str, str]) -> Moments | None:
    if not path.exists():
        return None
    try:
        target = Moments.load(path, expected)
    except InputError:
        log.warning("%s: damaged, so the target moments are computed again", path)
        path.unlink(missing_ok=True)
        return None
    log.info("target moments: cached in %s", path)
    return target


def write_bad_images(path: str | Path, target: Moments) -> None:
    """List the images that the target leaves out in a text file, `file: reason` a line; no file if there are none."""
    path = Path(path)
    if target.skipped:
        write_atomically(path, "".join(f"{line}\n" for line in target.skipped).encode())
        log.warning("%d bad images were left out: %s", len(target.skipped), path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time works at `path`; the others wait. A kill frees it, and leaves nothing half-written.

    Inside, what killed writes of `path` and of its partial state left behind is removed.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise InputError(f"{path}: could not be written, {error.strerror or error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process is at it; waiting", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: two processes may both compute, and both write the same
        try:
            for name in (path.name, path.with_suffix(".partial").name):
                for leftover in path.parent.glob(f".{glob.escape(name)}.*.tmp"):
                    leftover.unlink(missing_ok=True)
            yield
        finally:
            lock.unlink(missing_ok=True)


def _continued(images: ImageLoader, position: int) -> Iterator:
    """The batches of epoch 0 from `position` on: a target is always of epoch 0's order."""
    images.epoch = 0
    return images.batches(position)


def _unique(lines) -> list[str]:
    """Lines on bad images, sorted, one for each file: mirrored images and several ranks meet the same file again."""
    by_file: dict[str, str] = {}
    for line in lines:
        by_file.setdefault(line.rpartition(": ")[0], line)
    return sorted(by_file.values())


def _how_to_go_on(count: int, images: ImageLoader, state: Pass) -> str:
    after = f"stopped after {count} of {images.num_images} images"
    if images.num_shards > 1:
        after += f" of shard {images.shard}"
    return after if state.path is None else f"{after}; the same command goes on from there"


class _Stop(StopRequest):
    """As for training; but launchers send the same signal more than once, so several ranks don't count seconds."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.ranks = ranks

    def _request(self, number: int, frame: object) -> None:
        if self.ranks.size == 1:
            super()._request(number, frame)
        self.requested = True


class _Progress:
    """A bar with images/s and the time left; a line now and then where there is no terminal."""

    def __init__(self, images: ImageLoader, position: int, *, show: bool):
        self.total = images.num_images
        self.done = self.start = min(position * images.batch_size, self.total)
        self.show = show
        self.what = "target moments"
        if images.num_shards > 1:
            self.what += f" (process {images.shard + 1} of {images.num_shards})"
        self.bar: tqdm | None = None
        if show and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=self.done, desc=self.what, unit=" images", dynamic_ncols=True)
        self.begun = time.monotonic()
        self.next = self.begun + LINE_EVERY

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, count: int) -> None:
        """`count` more images are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        now = time.monotonic()
        if not self.show or self.bar is not None or now < self.next:
            return
        self.next = now + LINE_EVERY
        rate = (self.done - self.start) / max(now - self.begun, 1e-9)
        left = (self.total - self.done) / rate
        log.info("%s: %d/%d images, %.0f images/s, %.0f s left", self.what, self.done, self.total, rate, left)
