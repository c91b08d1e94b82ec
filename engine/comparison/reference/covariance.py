"""Mean and full covariance of pooled features of real images: what Fréchet distances compare with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.comparison.distances.moments import check_fingerprint
from engine.comparison.pooling import make_pool, sizes
from engine.comparison.reference.bank import BankCollector, BankKind, FeatureBank, scales_of
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.protocols import TapInput
from engine.support.errors import InputError
from engine.support.files import open_safetensors, read_safetensors, save_safetensors

_FORMAT = "gfmn-covariance-1"
MOST_FEATURES = 16_384
"""Of a covariance: 2 GiB in float64."""


class FeatureCovariance:
    """Mean and centred second moments of pooled features (`engine.comparison.reference.protocols.Reference`).

    Args:
        count: images, n.
        mean: [F] float64, 1/n Σ x.
        m2: [F, F] float64, Σ (x − mean)(x − mean)ᵀ.
        sizes: features of every tap, F together.
        fingerprint, skipped: see `Reference`.
    """

    def __init__(
        self,
        count: int,
        mean: Tensor,
        m2: Tensor,
        sizes: Sequence[int],
        fingerprint: Mapping[str, str] | None = None,
        skipped: Sequence[str] = (),
    ):
        features = sum(sizes)
        if mean.shape != (features,) or m2.shape != (features, features):
            raise InputError("m2", f"must be [{features}, {features}], got {list(m2.shape)}")
        self.count, self.mean, self.m2, self.sizes = count, mean, m2, tuple(sizes)
        self.fingerprint = None if fingerprint is None else dict(fingerprint)
        self.skipped = tuple(skipped)

    @property
    def nbytes(self) -> int:
        """Of mean and M2 together."""
        return self.mean.nbytes + self.m2.nbytes

    def covariance(self) -> Tensor:
        """[F, F] float64, M2/(n − 1); InputError if there are fewer than two images."""
        if self.count < 2:
            raise InputError("", f"a covariance needs at least 2 images, there are {self.count}")
        return self.m2 / (self.count - 1)

    def scales(self) -> Tensor:
        """See `engine.comparison.reference.bank.scales_of`."""
        return scales_of(self.m2.diagonal() / max(self.count, 1), self.sizes)

    def merge(self, other: FeatureCovariance) -> FeatureCovariance:
        """Of the union of two disjoint sets of images (Chan, Golub, LeVeque 1979): M2 + M2' + δδᵀ·n n'/(n + n')."""
        if other.sizes != self.sizes:
            raise InputError("other", f"has {other.sizes} features of the taps, not {self.sizes}")
        total = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / max(total, 1)
        return FeatureCovariance(
            total,
            self.mean + delta * share,
            (self.m2 + other.m2).addr_(delta, delta, alpha=self.count * share),
            self.sizes,
            self.fingerprint if self.fingerprint is not None else other.fingerprint,
            tuple(dict.fromkeys(self.skipped + other.skipped)),
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        metadata = {
            "format": _FORMAT,
            "count": str(self.count),
            "sizes": json.dumps(self.sizes),
            "fingerprint": json.dumps(self.fingerprint),
        }
        if self.skipped:
            metadata["skipped"] = json.dumps(self.skipped)
        save_safetensors(path, {"mean": self.mean.cpu(), "m2": self.m2.cpu()}, metadata)

    @classmethod
    def load(cls, path: str | Path, expected: Mapping[str, str] | None = None) -> FeatureCovariance:
        """Read a file that `save` wrote; InputError that names it if it is something else, or not as `expected`."""
        path = Path(path)
        tensors, metadata = read_safetensors(path, _FORMAT, "a covariance of real features")
        try:
            found = cls(
                int(metadata["count"]),
                tensors["mean"],
                tensors["m2"],
                json.loads(metadata["sizes"]),
                json.loads(metadata["fingerprint"]),
                json.loads(metadata.get("skipped", "[]")),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(path, f"is not a readable covariance of real features ({error}); make it again") from None
        if expected is not None and found.fingerprint is not None:
            check_fingerprint(expected, found.fingerprint, path)
        return found


class CovarianceCollector:
    """Collects a `FeatureCovariance` (`engine.comparison.reference.protocols.ReferenceCollector`).

    Every batch is merged into those before it as `FeatureCovariance.merge` does.

    Args:
        extractor: as it runs.
        pool: a name that `make_pool` knows.
    """

    def __init__(self, extractor: Extractor, pool: str):
        self.pool = make_pool(pool)
        self.sizes = sizes(self.pool, extractor.taps)
        features = sum(self.sizes)
        self.mean = torch.zeros(features, dtype=torch.float64, device=extractor.device)
        self.m2 = torch.zeros(features, features, dtype=torch.float64, device=extractor.device)
        self.count = 0
        self._arriving: list[Tensor] = []

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        self._arriving.append(self.pool(x.activate_()).double())

    def end_batch(self, indices: Tensor) -> None:
        """Merge the batch."""
        features, self._arriving = torch.cat(self._arriving, dim=1), []
        mean = features.mean(dim=0)
        centred = features - mean
        total = self.count + len(features)
        delta = mean - self.mean
        self.m2.addmm_(centred.T, centred).addr_(delta, delta, alpha=self.count * len(features) / total)
        self.mean += delta * (len(features) / total)
        self.count = total

    def state(self) -> dict[str, Tensor]:
        """Mean and M2, and how many images they are of."""
        return {"mean": self.mean, "m2": self.m2, "count": torch.tensor(self.count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        if state["mean"].shape != self.mean.shape or state["m2"].shape != self.m2.shape:
            raise InputError("state", "is of other features")
        self.mean.copy_(state["mean"])
        self.m2.copy_(state["m2"])
        self.count = int(state["count"])

    def result(self, fingerprint: Mapping[str, str], skipped: Sequence[str]) -> FeatureCovariance:
        return FeatureCovariance(self.count, self.mean.cpu(), self.m2.cpu(), self.sizes, fingerprint, skipped)


@dataclass(frozen=True)
class CovarianceKind:
    """Mean and covariance (`engine.comparison.reference.protocols.Kind`), or what they are made of, if that is less.

    Of fewer images than features the features themselves are kept: their covariance has no higher rank, and what is
    computed from it costs less.

    Args:
        pool: a name that `make_pool` knows.
    """

    pool: str

    @property
    def entries(self) -> dict[str, str]:
        """The kind and its pool."""
        return {"reference": "covariance of pooled features", "pool": self.pool}

    def collector(self, feature_pass: FeaturePass, images: int) -> CovarianceCollector | BankCollector:
        """See `Kind.collector`."""
        if not self.is_covariance(feature_pass.prepared, images):
            return BankKind(self.pool, images).collector(feature_pass, images)
        return CovarianceCollector(feature_pass.prepared, self.pool)

    def is_covariance(self, extractor: Extractor, images: int) -> bool:
        """Whether that of so many images is kept, and not their features; InputError if it would be too large."""
        features = sum(sizes(make_pool(self.pool), extractor.taps))
        if images <= features:
            return False
        if features > MOST_FEATURES:
            raise InputError(
                "pool",
                f"{self.pool} makes {features:,} features, and a covariance takes at most {MOST_FEATURES:,}; choose a "
                "coarser one (mean), or fewer layers",
            )
        return True

    def finished(self, collected: FeatureCovariance | FeatureBank) -> FeatureCovariance | FeatureBank:
        """See `Kind.finished`."""
        return collected

    def load(self, path: str | Path, expected: Mapping[str, str] | None = None) -> FeatureCovariance | FeatureBank:
        """See `Kind.load`."""
        with contextlib.suppress(SafetensorError, OSError), open_safetensors(path) as file:
            if (file.metadata() or {}).get("format") == _FORMAT:
                return FeatureCovariance.load(path, expected)
        return FeatureBank.load(path, expected)
