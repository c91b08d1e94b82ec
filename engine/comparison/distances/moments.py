"""Per-feature moments that merge exactly: one type for chunks, ranks, shards and whole datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.support.errors import InputError, differences
from engine.support.files import check_file, read_tensors, save_safetensors

_FORMAT = "gfmn-moments-1"


def union(
    count: int, mean: Tensor, m2: Tensor, other_count: int, other_mean: Tensor, other_m2: Tensor
) -> tuple[int, Tensor, Tensor]:
    """(n, mean, M2) of the union of two disjoint sets (Chan, Golub, LeVeque 1979), neither of them empty:

    δ = mean_B − mean_A,  n = n_A + n_B,  mean = mean_A + δ n_B/n,  M2 = M2_A + M2_B + δ² n_A n_B/n
    """
    total = count + other_count
    delta = other_mean - mean
    merged = mean + delta * (other_count / total)
    return total, merged, m2 + other_m2 + delta.square() * (count * other_count / total)


class Moments:
    """Count, mean and centred second moment of every feature over a set of images.

    Args:
        count: number of images, n ≥ 0.
        mean: `[D]`, 1/n Σ x; converted to float64.
        m2: `[D]`, Σ (x − mean)²; converted to float64.
        fingerprint: what the features came from (extractor weights, taps, image size, precision, dataset, …), each
            entry a name and a value; None means unchecked.
        skipped: the images that were left out of a dataset, a line each: which, and why.
    """

    def __init__(
        self,
        count: int,
        mean: Tensor,
        m2: Tensor,
        fingerprint: Mapping[str, str] | None = None,
        skipped: Sequence[str] = (),
    ):
        if mean.dim() != 1 or mean.shape != m2.shape:
            raise ValueError(f"mean, m2: must both be [D], got {tuple(mean.shape)} and {tuple(m2.shape)}")
        if not 0 <= count < 2**63:
            raise ValueError(f"count: must be from 0 to 2^63 − 1, got {count}")
        self.count = int(count)
        self.mean = mean.detach().to(torch.float64)
        self.m2 = m2.detach().to(torch.float64)
        self.fingerprint = None if fingerprint is None else dict(fingerprint)
        self.skipped = tuple(skipped)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of `features` [n, D], computed in float64; zeros if n = 0."""
        if len(features) == 0:
            zeros = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
            return cls(0, zeros, zeros.clone())
        m2, mean = torch.var_mean(features.detach().to(torch.float64), dim=0, correction=0)
        return cls(len(features), mean, m2 * len(features))

    @property
    def num_features(self) -> int:
        """D, the number of features."""
        return self.mean.numel()

    @property
    def nbytes(self) -> int:
        """Of mean and M2 together."""
        return self.mean.nbytes + self.m2.nbytes

    def variance(self, correction: int = 1) -> Tensor:
        """`[D]`, M2 / (n − correction); ValueError if there are too few images."""
        if self.count <= correction:
            raise InputError(
                "", f"variance with correction {correction} needs more than {self.count} images; give more"
            )
        return self.m2 / (self.count - correction)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets (see `union`)."""
        if other.num_features != self.num_features:
            raise InputError("other", f"has {other.num_features} features, not {self.num_features}")
        if self.fingerprint is not None and other.fingerprint is not None:
            check_fingerprint(self.fingerprint, other.fingerprint, "other")
        fingerprint = self.fingerprint if self.fingerprint is not None else other.fingerprint
        skipped = tuple(dict.fromkeys(self.skipped + other.skipped))
        # No images, no values: whatever the buffers of an empty set hold (a zero-size batch leaves NaN) stays out.
        if self.count == 0 or other.count == 0:
            filled = other if self.count == 0 else self
            return Moments(filled.count, filled.mean, filled.m2, fingerprint, skipped)
        merged = union(self.count, self.mean, self.m2, other.count, other.mean, other.m2)
        return Moments(*merged, fingerprint, skipped)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        metadata = {"format": _FORMAT, "count": str(self.count), "fingerprint": json.dumps(self.fingerprint)}
        if self.skipped:
            metadata["skipped"] = json.dumps(self.skipped)
        save_safetensors(path, {"mean": self.mean.cpu(), "m2": self.m2.cpu()}, metadata)

    @classmethod
    def load(cls, path: str | Path, expected: Mapping[str, str] | None = None) -> Moments:
        """Read a file that `save` wrote; `expected` entries must equal those of the file's fingerprint.

        Raises InputError that names the file if it is missing, damaged, of another kind, or differs from `expected`.
        """
        path = Path(path)
        check_file(path, "no such target file; make one with engine.precompute")
        try:
            tensors, metadata = read_tensors(path)
            if metadata.get("format") != _FORMAT:
                raise InputError(path, "is not a target of moments; make one with engine.precompute")
            moments = cls(
                int(metadata["count"]),
                tensors["mean"],
                tensors["m2"],
                json.loads(metadata["fingerprint"]),
                json.loads(metadata.get("skipped", "[]")),
            )
        except InputError:
            raise
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(path, f"is not a readable target of moments ({reason}); make it again") from None
        if expected is not None and moments.fingerprint is not None:
            check_fingerprint(expected, moments.fingerprint, path)
        return moments

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, num_features={self.num_features})"


def check_fingerprint(expected: Mapping[str, str], found: Mapping[str, str], what: str | Path) -> None:
    """Compare the entries that both fingerprints have; InputError names every one that differs."""
    if different := differences(found, expected):
        raise InputError(what, f"was made from something else: {different}")
