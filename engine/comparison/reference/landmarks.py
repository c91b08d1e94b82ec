"""A few landmarks of the real images' pooled features, with weights that stand for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.comparison.distances import LandmarkMMD
from engine.comparison.distances.kernels import Kernel
from engine.comparison.distances.moments import check_fingerprint
from engine.comparison.reference.bank import BankCollector, BankKind, FeatureBank
from engine.representation.feature_pass import FeaturePass
from engine.support.errors import InputError
from engine.support.files import read_safetensors, save_safetensors

_FORMAT = "gfmn-landmarks-1"


class FeatureLandmarks:
    """Landmarks of a set of real images (`engine.comparison.reference.protocols.Reference`).

    The features are compared in parts, all together or each network's for itself; a part has its own landmarks.

    Args:
        count: images that the weights stand for.
        points: of every part, [M, F of the part]: features after they were multiplied by `scales`.
        weights: of every part, [M] float64; see `LandmarkMMD.of_weights`.
        scales: [F], what the features of an image are multiplied by first.
        fingerprint, skipped: see `Reference`.
    """

    def __init__(
        self,
        count: int,
        points: Sequence[Tensor],
        weights: Sequence[Tensor],
        scales: Tensor,
        fingerprint: Mapping[str, str] | None = None,
        skipped: Sequence[str] = (),
    ):
        features = [part.shape[1] if part.dim() == 2 else 0 for part in points]
        if scales.shape != (sum(features),) or not all(features):
            raise InputError("points", f"must have {list(scales.shape)} features together, got {features}")
        if [len(part) for part in points] != [part.numel() for part in weights]:
            raise InputError("weights", "must be as many as there are points")
        self.count, self.points, self.weights, self.scales = count, tuple(points), tuple(weights), scales
        self.fingerprint = None if fingerprint is None else dict(fingerprint)
        self.skipped = tuple(skipped)

    @property
    def nbytes(self) -> int:
        """Of points, weights and scales together."""
        return sum(tensor.nbytes for tensor in (*self.points, *self.weights, self.scales))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {"scales": self.scales}
        for name, parts in (("points", self.points), ("weights", self.weights)):
            tensors |= {f"{name}.{place}": part for place, part in enumerate(parts)}
        metadata = {"format": _FORMAT, "count": str(self.count), "fingerprint": json.dumps(self.fingerprint)}
        if self.skipped:
            metadata["skipped"] = json.dumps(self.skipped)
        save_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, expected: Mapping[str, str] | None = None) -> FeatureLandmarks:
        """Read a file that `save` wrote; InputError that names it if it is something else, or not as `expected`."""
        path = Path(path)
        tensors, metadata = read_safetensors(path, _FORMAT, "a file of landmarks of real features")
        try:
            parts = range(sum(name.startswith("points.") for name in tensors))
            found = cls(
                int(metadata["count"]),
                [tensors[f"points.{place}"] for place in parts],
                [tensors[f"weights.{place}"] for place in parts],
                tensors["scales"],
                json.loads(metadata["fingerprint"]),
                json.loads(metadata.get("skipped", "[]")),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(path, f"is no readable file of landmarks ({error}); make it again") from None
        if expected is not None and found.fingerprint is not None:
            check_fingerprint(expected, found.fingerprint, path)
        return found


@dataclass(frozen=True)
class LandmarksKind:
    """Landmarks by k-means (`engine.comparison.reference.protocols.Kind`) of the features that a bank would hold.

    Args:
        bank: which features of which images.
        landmarks: how many for each part, M; at most the number of images.
        kernel: that the weights are of.
        parts: the features that are compared together; see `FeatureLandmarks`.
        seed: of k-means.
    """

    bank: BankKind
    landmarks: int
    kernel: Kernel
    parts: tuple[slice, ...]
    seed: int

    @property
    def entries(self) -> dict[str, str]:
        """Those of the bank, and what landmarks and weights depend on besides.

        No entry of the bank's is another one here: runs that kept a bank, and made the landmarks of it, can be resumed.
        """
        return {
            **self.bank.entries,
            "landmarks": f"{self.landmarks} by k-means with seed {self.seed}",
            "kernel": repr(self.kernel),
            "parts": str(len(self.parts)),
        }

    def collector(self, feature_pass: FeaturePass, images: int) -> BankCollector:
        """See `Kind.collector`."""
        return self.bank.collector(feature_pass, images)

    def finished(self, collected: FeatureBank) -> FeatureLandmarks:
        """See `Kind.finished`. InputError on "landmarks" if there are fewer images, "ridge" if they are too alike."""
        scales = collected.unit_scales(self.parts)
        features, points, weights = collected.features * scales, [], []
        for part in self.parts:
            bound = LandmarkMMD(features[:, part].contiguous(), self.kernel, self.landmarks, seed=self.seed)
            points.append(bound.landmarks.clone())
            weights.append(bound.weights)
        return FeatureLandmarks(collected.count, points, weights, scales, collected.fingerprint, collected.skipped)

    def load(self, path: str | Path, expected: Mapping[str, str] | None = None) -> FeatureLandmarks:
        """See `Kind.load`."""
        return FeatureLandmarks.load(path, expected)
