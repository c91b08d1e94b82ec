"""Moments of a whole dataset: float64 accumulators that every batch's features are merged into.

Per-batch moments in float32 would cost up to 1e-4 of the variance of features whose mean is large, or that are rarely
on. Here all sums are in float64, centred on the running mean, whatever the features' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from engine.comparison.distances.moments import Moments
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.memory_order import FeatureOrder
from engine.representation.protocols import TapInput
from engine.representation.tracing.tap import activate_
from kernels import compiled
from kernels.layout import feature_rows

STREAMS = 16
"""Images that the streaming kernel reads side by side, each as one run of consecutive memory."""
_STREAMED_FEATURES = 2**15  # below, a tap's images fit the caches, and the compiled kernel is faster
_STREAMED_IMAGES = 10_000  # below, compiling the streaming kernel costs more than it saves
_BLOCK = 2**22  # features × images converted to float64 at once (32 MiB)


class DatasetCollector:
    """The moments of every tap over a whole dataset, in float64 and in memory order (a `ReferenceCollector`).

    Every batch of n images is merged into the N before it (Chan, Golub, LeVeque 1979):

        δ = mean_batch − mean,  mean ← mean + δ n/(N+n),  M2 ← M2 + M2_batch + δ² N n/(N+n)

    Args:
        extractor: whose taps are collected, as it runs (`FeaturePass.prepared`).
        order: of its features.
        kernels: the backend: `compiled` fuses activation and moments; for others plain PyTorch does the same maths.
        images: how many are expected, which decides what is worth compiling.
    """

    def __init__(self, extractor: Extractor, order: FeatureOrder, kernels: ModuleType, images: int):
        self.order = order
        self.mean = torch.zeros(extractor.num_features, dtype=torch.float64, device=extractor.device)
        self.m2 = torch.zeros_like(self.mean)
        self.means, self.m2s = order.slices(self.mean), order.slices(self.m2)
        self.count = 0
        self._merges: list[Callable[..., None]] = [_relu_moments] * len(extractor.taps)
        if kernels is compiled:
            streamed = images >= _STREAMED_IMAGES and extractor.device.type == "cpu"
            self._merges = [
                _streamed if streamed and tap.num_features >= _STREAMED_FEATURES else compiled.relu_moments
                for tap in extractor.taps
            ]

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        self._merges[tap](x.x, self.means[tap], self.m2s[tap], self.count, None, x.residual, x.activation)

    def end_batch(self, indices: Tensor) -> None:
        """All taps have seen the batch: its images count from now on."""
        self.count += len(indices)

    def state(self) -> dict[str, Tensor]:
        """Mean and M2, in memory order, and how many images they are of."""
        return {"mean": self.mean, "m2": self.m2, "count": torch.tensor(self.count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; ValueError if it is of other features."""
        mean, m2 = state["mean"], state["m2"]
        if mean.shape != self.mean.shape or m2.shape != mean.shape or mean.dtype != torch.float64:
            raise ValueError("state: is of other features")
        self.mean.copy_(mean)
        self.m2.copy_(m2)
        self.count = int(state["count"])

    def result(self, fingerprint: Mapping[str, str], skipped: Sequence[str]) -> Moments:
        """The target."""
        mean, m2 = (self.order.to_public(buffer) for buffer in (self.mean, self.m2))
        return Moments(self.count, mean, m2, fingerprint, skipped)


def fake_target(num_features: int) -> Moments:
    """A target of zeros, for models of a step that look at shapes alone."""
    zeros = torch.zeros(num_features, dtype=torch.float64)
    return Moments(2, zeros, zeros)


class MomentsKind:
    """The target: moments of every feature (`engine.comparison.reference.protocols.Kind`)."""

    entries: ClassVar[dict[str, str]] = {}

    def collector(self, feature_pass: FeaturePass, images: int) -> DatasetCollector:
        """See `Kind.collector`."""
        order = FeatureOrder(feature_pass.prepared.taps)
        return DatasetCollector(feature_pass.prepared, order, feature_pass.kernels, images)

    def load(self, path: str | Path, expected: Mapping[str, str] | None = None) -> Moments:
        """See `Moments.load`."""
        return Moments.load(path, expected)


def _relu_moments(
    x: Tensor, mean: Tensor, m2: Tensor, count: int, bias: None, residual: Tensor | None, activation: str
) -> None:
    """`kernels.relu_moments` in plain PyTorch, with `mean` and `m2` in float64 for x of any dtype."""
    activate_(x, residual, activation)
    rows = feature_rows(x)
    for part in rows.split(max(_BLOCK // rows.shape[1], 1)):
        arriving = len(part)
        values = part.to(torch.float64)
        arriving_mean = values.mean(dim=0)
        squares = values.sub(arriving_mean).square_().sum(dim=0)
        total = count + arriving
        delta = arriving_mean.sub_(mean)
        m2 += squares.addcmul_(delta, delta, value=count * arriving / total)
        mean += delta.mul_(arriving / total)
        count = total


@torch.no_grad()
def _streamed(
    x: Tensor, mean: Tensor, m2: Tensor, count: int, bias: None, residual: Tensor | None, activation: str
) -> None:
    """`compiled.relu_moments` for large taps on a CPU: `STREAMS` images at a time in one pass over the features.

    A loop over all images for each feature jumps by a whole image at every read, which neither the prefetcher nor the
    address cache of a CPU follows; a few images side by side are as many plain streams.
    """
    if residual is not None:
        # First on its own: twice as many streams are no faster, and take Inductor minutes to compile.
        activate_(x, residual, activation)
        residual, activation = None, "none"
    whole = len(x) // STREAMS * STREAMS if count else 0
    if whole:
        rows = feature_rows(x).data
        for start in range(0, whole, STREAMS):
            part = list(rows[start : start + STREAMS].unbind())
            _merge_streams(part, mean.data, m2.data, mean.new_tensor(count + start), activation)
    if whole < len(x):
        compiled.relu_moments(x[whole:], mean, m2, count + whole, None, None, activation)


@torch.compile(dynamic=True, fullgraph=True, options={"cpp.dynamic_threads": True})
def _merge_streams(rows: list[Tensor], mean: Tensor, m2: Tensor, count: Tensor, activation: str) -> None:
    values = rows
    if activation == "relu":
        values = [torch.relu(value) for value in values]
    elif activation == "relu6":
        values = [value.clamp(min=0, max=6) for value in values]
    centred = values[0].to(torch.float64) - mean
    sums, squares = centred, centred * centred
    for value in values[1:]:
        centred = value.to(torch.float64) - mean
        sums, squares = sums + centred, squares + centred * centred
    if activation != "none":
        for row, value in zip(rows, values):
            row.copy_(value)
    offset = sums / len(rows)
    share = len(rows) / (count + len(rows))
    m2.add_(squares - sums * offset + offset.square() * (count * share))
    mean.add_(offset * share)
