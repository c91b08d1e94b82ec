"""One pass over the whole real data set, which any kind of reference comes from; resumed after a kill, and sharded.

A pass is one sequence of batches. Its state is the position in the sequence and what the collector holds, and each
batch is merged into it in turn, so a pass that resumes from a saved state ends in the same bits as one never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.comparison.reference.protocols import Kind, Reference
from engine.comparison.reference.saved_pass import SavedPass
from engine.representation.extractor import Extractor, feature_fingerprint
from engine.representation.feature_pass import FeaturePass
from engine.support.errors import InputError, Interrupted, differences
from engine.training.progress import Progress
from engine.training.ranks import ALONE, EndedElsewhere, Ranks
from engine.training.stopping import StopRequest
from pipelines import Batch, DataError, ImageDataset, ImageLoader

SAVE_EVERY = 30.0
"""Seconds between two saves of a pass's state."""

R = TypeVar("R", bound=Reference)


def reference_loader(
    extractor: Extractor,
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    loader: str = "auto",
    shard: int = 0,
    num_shards: int = 1,
) -> ImageLoader:
    """The images in the order of a statistics pass: shuffled with `seed` if batch statistics make minibatches matter.

    Raises InputError for several shards with batch statistics: their minibatches would be others than one process's.
    """
    if extractor.batch_statistics and num_shards > 1:
        raise InputError("bn", "batch statistics depend on the minibatches; run this in one process")
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


def data_fingerprint(images: ImageLoader) -> dict[str, str]:
    """What decides the images themselves: the data set's files, their preprocessing, and who decodes them."""
    return {f"data_{name}": str(value) for name, value in images.fingerprint().items()}


def fingerprint(
    kind: Kind[Any], extractor: Extractor, images: ImageLoader, amp_dtype: torch.dtype | None
) -> dict[str, str]:
    """Everything that decides a reference's values: its kind, extractor, precision, images, and who decodes them.

    Batch statistics (`bn="batch"`) depend on the minibatches too, so there their size and seed count.
    """
    entries = data_fingerprint(images)
    if extractor.batch_statistics:
        entries["minibatches"] = f"{images.batch_size} shuffled with seed {images.seed}"
    return {**feature_fingerprint(extractor, amp_dtype), **entries, **kind.entries}


def compute_reference(
    kind: Kind[R],
    extractor: Extractor,
    images: ImageLoader,
    *,
    amp_dtype: torch.dtype | None = None,
    kernels: str = "auto",
    progress: bool = True,
    partial: str | Path | None = None,
    ranks: Ranks = ALONE,
) -> R:
    """Stream every image once through the extractor and collect a reference.

    With running statistics the result is independent of batch size, order and number of ranks, up to rounding. The same
    batches on the same machine give the same bits, interrupted or not.

    Args:
        kind: of the reference.
        extractor: frozen, on its device.
        images: the pass's loader, this rank's shard of it if there are several.
        amp_dtype: low precision of the extractor's arithmetic, None for its own.
        kernels: backend, see `kernels.select`.
        progress: a bar on a terminal, lines elsewhere.
        partial: file of the pass's state, written every `SAVE_EVERY` seconds and on Ctrl-C, and resumed from if it is
            there and fits. It stays: call `forget_partials` once the result is safe. None keeps nothing.
        ranks: the processes that share the dataset.

    Returns the reference of all ranks, merged in rank order, on rank 0; on other ranks that of their own images.

    Raises InputError or DataError for unusable images, Interrupted after Ctrl-C on any rank, EndedElsewhere on other
    ranks' errors.
    """
    feature_pass = FeaturePass(extractor, dtype=amp_dtype, kernels=kernels)
    entries = fingerprint(kind, extractor, images, amp_dtype)
    check_same_features(entries, ranks)
    shard = f"{images.shard} of {images.num_shards}"
    own = {**entries, "batch_size": str(images.batch_size), "shard": shard}
    state = SavedPass(path=None if partial is None else Path(partial), of=own)
    collector = kind.collector(feature_pass, len(images.dataset))
    position, skipped = state.restore(collector)

    def all_skipped() -> list[str]:
        return _unique([*skipped, *map(str, images.bad_images)])

    def stopped(status: int) -> Interrupted:
        return Interrupted(_where(collector.count, images, state), status)

    saved = time.monotonic()
    # Launchers send the same signal more than once, so several ranks don't count.
    with (
        StopRequest(patient=ranks.size > 1) as stop,
        _progress(images, position, show=progress and ranks.rank == 0) as shown,
    ):
        try:
            for batch in _continued(images, position):
                feature_pass.collect(batch.images, collector)
                collector.end_batch(batch.indices)
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
        except (EndedElsewhere, Interrupted) as ended:
            state.save(collector, position, all_skipped())
            raise stopped(ended.status) if isinstance(ended, Interrupted) else ended from None
        if stop.requested or ranks.size > 1:
            state.save(collector, position, all_skipped())
        if stop.requested and position < len(images):
            raise stopped(stop.status)
        try:
            lists = ranks.meet("skipped", [collector.count, all_skipped()], lambda: stop.requested)
        except KeyboardInterrupt:
            raise stopped(stop.status or 130) from None
        except Interrupted as elsewhere:
            raise stopped(elsewhere.status) from None
    if not images.dataset.skip_bad_images and fingerprint(kind, extractor, images, amp_dtype) != entries:
        raise DataError("the dataset changed while it was read, so its moments are of neither version; run this again")
    lines = _unique(line for _, lines in lists for line in lines)
    states = ranks.to_first(collector.state())
    if ranks.rank == 0 and not any(count for count, _ in lists):
        raise InputError(f"no image could be used, the first of {len(lines)} reasons: {(lines or ['no images'])[0]}")
    result = collector.result(entries, lines)
    for other in states[1:]:
        part = kind.collector(feature_pass, len(images.dataset))
        part.restore(other)
        result = result.merge(part.result(entries, lines))
    return result


def check_same_features(entries: dict[str, str], ranks: Ranks, what: str = "features") -> None:
    """Wait for all ranks; InputError unless what decides their features has the same `entries` as on rank 0."""
    first, *others = ranks.meet(what, entries)
    for rank, theirs in enumerate(others, start=1):
        if different := differences(first, theirs):
            raise InputError("", f"process {rank} has other {what} than process 0: {different}")


def _continued(images: ImageLoader, position: int) -> Iterator[Batch]:
    """The batches of epoch 0 from `position` on: a reference is always of epoch 0's order."""
    images.epoch = 0
    return images.batches(position)


def _unique(lines: Iterable[str]) -> list[str]:
    """Lines on bad images, sorted, one for each file: mirrored images and several ranks meet the same file again."""
    by_file: dict[str, str] = {}
    for line in lines:
        by_file.setdefault(line.rpartition(": ")[0], line)
    return sorted(by_file.values())


def _where(count: int, images: ImageLoader, state: SavedPass) -> str:
    after = f"stopped after {count} of {images.num_images} images"
    if images.num_shards > 1:
        after += f" of shard {images.shard}"
    return after if state.path is None else f"{after}; the same command resumes there"


def _progress(images: ImageLoader, position: int, *, show: bool) -> Progress:
    what = "target moments"
    if images.num_shards > 1:
        what += f" (process {images.shard + 1} of {images.num_shards})"
    done = min(position * images.batch_size, images.num_images)
    return Progress(what, images.num_images, done=done, unit="images", show=show)
