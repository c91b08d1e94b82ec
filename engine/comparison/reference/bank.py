"""A bank of pooled features of real images: what distances of whole sets compare with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.comparison.distances.kernels import median_distance
from engine.comparison.distances.moments import check_fingerprint
from engine.comparison.pooling import make_pool, sizes
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.protocols import TapInput
from engine.support.errors import InputError
from engine.support.files import read_safetensors, save_safetensors
from kernels.layout import accumulation_dtype

_FORMAT = "gfmn-features-1"


class FeatureBank:
    """Pooled features of a set of real images (`engine.comparison.reference.protocols.Reference`).

    Args:
        features: [M, F], the features of all taps of one image in a row.
        indices: [M], the images' places in their data set; rows are kept in this order.
        sizes: features of every tap, F together.
        fingerprint, skipped: see `Reference`.
    """

    def __init__(
        self,
        features: Tensor,
        indices: Tensor,
        sizes: Sequence[int],
        fingerprint: Mapping[str, str] | None = None,
        skipped: Sequence[str] = (),
    ):
        if features.dim() != 2 or features.shape[1] != sum(sizes):
            raise InputError("features", f"must be [M, {sum(sizes)}], got {list(features.shape)}")
        if indices.shape != (len(features),):
            raise InputError("indices", f"must be [{len(features)}], got {list(indices.shape)}")
        order = indices.argsort()
        self.features, self.indices = features[order.to(features.device)], indices[order]
        self.sizes, self.count = tuple(sizes), len(features)
        self.fingerprint = None if fingerprint is None else dict(fingerprint)
        self.skipped = tuple(skipped)

    def merge(self, other: FeatureBank) -> FeatureBank:
        """The bank of both sets, in the order of the data set."""
        if other.sizes != self.sizes:
            raise InputError("other", f"has {other.sizes} features of the taps, not {self.sizes}")
        return FeatureBank(
            torch.cat([self.features, other.features]),
            torch.cat([self.indices, other.indices]),
            self.sizes,
            self.fingerprint if self.fingerprint is not None else other.fingerprint,
            tuple(dict.fromkeys(self.skipped + other.skipped)),
        )

    @property
    def nbytes(self) -> int:
        """Of the features."""
        return self.features.nbytes

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        metadata = {"format": _FORMAT, "sizes": json.dumps(self.sizes), "fingerprint": json.dumps(self.fingerprint)}
        if self.skipped:
            metadata["skipped"] = json.dumps(self.skipped)
        save_safetensors(path, {"features": self.features, "indices": self.indices}, metadata)

    @classmethod
    def load(cls, path: str | Path, expected: Mapping[str, str] | None = None) -> FeatureBank:
        """Read a file that `save` wrote; InputError that names it if it is something else, or not as `expected`."""
        path = Path(path)
        tensors, metadata = read_safetensors(path, _FORMAT, "a bank of real features")
        try:
            fingerprint = json.loads(metadata["fingerprint"])
            skipped = json.loads(metadata.get("skipped", "[]"))
            bank = cls(tensors["features"], tensors["indices"], json.loads(metadata["sizes"]), fingerprint, skipped)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(path, f"is not a readable bank of real features ({error}); make it again") from None
        if expected is not None and bank.fingerprint is not None:
            check_fingerprint(expected, bank.fingerprint, path)
        return bank

    def scales(self) -> Tensor:
        """See `scales_of`."""
        parts = torch.split(self.features, list(self.sizes), dim=1)  # one in float64 at a time
        variances = torch.cat([part.double().var(dim=0, correction=0) for part in parts])
        return scales_of(variances, self.sizes).to(self.features.dtype)

    def unit_scales(self, parts: Sequence[slice]) -> Tensor:
        """`scales`, and in each of `parts` of the features the median distance between images is 1 with them.

        InputError if most images are the same.
        """
        scales = self.scales()
        for part in parts:
            unit = median_distance(self.features[:, part] * scales[part])
            if not unit > 0:
                raise InputError("data", "the method needs real images that differ, and most of these are the same")
            scales[part] /= unit
        return scales


def scales_of(variances: Tensor, sizes: Sequence[int]) -> Tensor:
    """Factors [F], one for each tap and repeated over its features: 1/√(Σ variances of the tap's features).

    With them every tap contributes 2 to the mean of ‖x − y‖² over pairs of real images, however many features it
    has and however large they are. A tap that never varies gets 0. One factor for each feature instead would blow
    up those that hardly vary.
    """
    totals = [part.sum() for part in torch.split(variances, list(sizes))]
    factors = [total.rsqrt() if total > 0 else total for total in totals]
    return torch.cat([factor.expand(size) for factor, size in zip(factors, sizes, strict=True)])


@dataclass(frozen=True)
class BankKind:
    """Banks of at most `at_most` images, evenly spaced over the data set; `pool` is a name that `make_pool` knows."""

    pool: str
    at_most: int

    @property
    def entries(self) -> dict[str, str]:
        return {"reference": "pooled features", "pool": self.pool, "at_most": str(self.at_most)}

    def collector(self, feature_pass: FeaturePass, images: int) -> BankCollector:
        """See `Kind.collector`."""
        chosen = torch.arange(images)
        if images > self.at_most:
            chosen = torch.arange(self.at_most) * images // self.at_most
        dtype = accumulation_dtype(feature_pass.dtype)
        return BankCollector(feature_pass.prepared, self.pool, chosen, dtype)

    def finished(self, collected: FeatureBank) -> FeatureBank:
        """See `Kind.finished`."""
        return collected

    def load(self, path: str | Path, expected: Mapping[str, str] | None = None) -> FeatureBank:
        """See `Kind.load`."""
        return FeatureBank.load(path, expected)


class BankCollector:
    """Collects a `FeatureBank` (`engine.comparison.reference.protocols.ReferenceCollector`).

    Args:
        extractor: as it runs.
        pool: a name that `make_pool` knows.
        chosen: the images that are kept, by their places in the data set, in rising order.
        dtype: of the features.
    """

    def __init__(self, extractor: Extractor, pool: str, chosen: Tensor, dtype: torch.dtype):
        self.pool = make_pool(pool)
        self.sizes = sizes(self.pool, extractor.taps)
        self.chosen, self.count = chosen, 0
        self.features = torch.empty(0, sum(self.sizes), dtype=dtype)
        self.indices = torch.empty(0, dtype=torch.int64)
        self._arriving: list[Tensor] = []
        self._batches: list[tuple[Tensor, Tensor]] = []

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        self._arriving.append(self.pool(x.activate_()).cpu())

    def end_batch(self, indices: Tensor) -> None:
        """Keep the chosen images of the batch."""
        kept = torch.isin(indices, self.chosen)
        self._batches.append((torch.cat(self._arriving, dim=1)[kept], indices[kept]))
        self._arriving = []
        self.count += len(indices)

    def state(self) -> dict[str, Tensor]:
        if self._batches:
            self.features = torch.cat([self.features, *(features for features, _ in self._batches)])
            self.indices = torch.cat([self.indices, *(indices for _, indices in self._batches)])
            self._batches = []
        return {"features": self.features, "indices": self.indices, "count": torch.tensor(self.count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        features = state["features"]
        if features.dim() != 2 or features.shape[1] != sum(self.sizes) or features.dtype != self.features.dtype:
            raise InputError("state", "is of other features")
        self.features, self.indices, self.count = features, state["indices"], int(state["count"])
        self._batches = []

    def result(self, fingerprint: Mapping[str, str], skipped: Sequence[str]) -> FeatureBank:
        state = self.state()
        return FeatureBank(state["features"], state["indices"], self.sizes, fingerprint, skipped)
