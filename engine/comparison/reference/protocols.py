"""What is known of the real images before training, of any kind; one resumable, sharded pass serves all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from engine.representation.feature_pass import FeaturePass
from engine.representation.protocols import Collector

R_co = TypeVar("R_co", bound="Reference", covariant=True)
C = TypeVar("C", bound="Collected")
C_co = TypeVar("C_co", bound="Collected", covariant=True)


class Reference(Protocol):
    """Computed once from the whole real data set, and saved with what it was computed from.

    Attributes:
        count: images that it is made of.
        fingerprint: of extractor, precision, images and decoder; None means unchecked.
        skipped: images that were left out, a line each.
        nbytes: about the size of its file.
    """

    count: int
    fingerprint: dict[str, str] | None
    skipped: tuple[str, ...]

    @property
    def nbytes(self) -> int: ...

    def save(self, path: str | Path) -> None:
        """Write a file, whole or not at all."""
        ...


class Collected(Reference, Protocol):
    """A reference that comes in shares: what a collector has of one rank's images."""

    def merge(self: C, other: C) -> C:
        """The reference of the union of two disjoint sets of images."""
        ...


class ReferenceCollector(Collector, Protocol[C_co]):
    """Collects a reference over the batches of a data set.

    Attributes:
        count: images of all batches that have ended.
    """

    count: int

    def end_batch(self, indices: Tensor) -> None:
        """All taps have seen the batch of the images `indices` of the data set: it counts from now on."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What the rest of the pass depends on, between two batches."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; ValueError or KeyError if it is of other features."""
        ...

    def result(self, fingerprint: Mapping[str, str], skipped: Sequence[str]) -> C_co:
        """The reference of all batches that have ended."""
        ...


class Kind(Protocol[R_co]):
    """A kind of reference.

    Attributes:
        entries: what of the kind itself belongs into a fingerprint.
    """

    @property
    def entries(self) -> dict[str, str]:
        """What of the kind itself belongs into a fingerprint."""
        ...

    def collector(self, feature_pass: FeaturePass, images: int) -> ReferenceCollector[Any]:
        """A new collector for the taps of `feature_pass`, over a data set of so many images."""
        ...

    def finished(self, collected: Any) -> R_co:
        """The reference, from what the collectors of all ranks gave, merged."""
        ...

    def load(self, path: str | Path, expected: Mapping[str, str] | None = None) -> R_co:
        """Read a file; InputError that names it if it is damaged, of another kind, or differs from `expected`."""
        ...
