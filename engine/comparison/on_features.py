"""Any differentiable distance of pooled features as an objective, exact for any minibatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from engine.comparison.pooling import Pool, make_pool, sizes
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass, check_whole
from engine.representation.protocols import PerImage, Ranks, TapInput
from engine.support.errors import InputError
from engine.training.ranks import ALONE
from kernels.layout import accumulation_dtype

_LOSS_FLOOR = 0.01
Discrepancy = Callable[[Tensor], Tensor]
"""A distance with the real side bound: features [N, F] → []."""


class OfNetworks(nn.Module):
    """The distances of several networks' features, added, or each divided by its own value:

        L = Σ_e L_e / (|L_e'| + 0.01),    L' = L detached

    so that no network counts more than another because its features are larger. An unbiased estimate may be negative;
    its gradient keeps its direction.

    Args:
        distances: of each network's features.
        parts: where these lie in [N, F]; with a single one nothing is divided.
        scales: [F], what the features are multiplied by first; None for 1.
    """

    def __init__(self, distances: Sequence[Discrepancy], parts: Sequence[slice], scales: Tensor | None):
        super().__init__()
        self.distances, self.parts, self.scales = list(distances), list(parts), scales
        # Those that remember something are part of the state.
        self.remembering = nn.ModuleDict(
            {str(place): found for place, found in enumerate(distances) if isinstance(found, nn.Module)}
        )

    def forward(self, features: Tensor) -> Tensor:
        """L of [N, F]."""
        if self.scales is not None:
            features = features * self.scales
        if len(self.parts) == 1:
            return self.distances[0](features)
        losses = [distance(features[:, part]) for distance, part in zip(self.distances, self.parts, strict=True)]
        return torch.stack([loss / (loss.detach().abs() + _LOSS_FLOOR) for loss in losses]).sum()


class FeatureCriterion:
    """The criterion of one minibatch: its pooled features, and the distance's gradient of each.

    The first pass leaves the pooled features x [N, F] of all chunks and ranks, without a graph. Autograd of the
    distance on that small matrix gives G = ∂L/∂x [N, F]. The second pass starts backward of each chunk from its rows
    of G (docs/method.md, identity 5).
    """

    def __init__(self, objective: OnFeatures, count: int, differentiable: bool):
        self.objective, self.differentiable = objective, differentiable
        extractor = objective.feature_pass.prepared
        self.taps, dtype = extractor.taps, accumulation_dtype(objective.feature_pass.dtype)
        self.sizes = sizes(objective.pool, self.taps)
        self.features = torch.empty(count, sum(self.sizes), dtype=dtype, device=extractor.device)
        if objective.feature_pass.max_chunks is not None:
            self.features.zero_()  # where chunks are left out
        self.of_taps = torch.split(self.features, self.sizes, dim=1)
        self.counts = objective.ranks.counting(count)
        self.gradients: tuple[Tensor, ...] = ()

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        self.of_taps[tap][images] = self.objective.pool(x.activate_())

    def finish(self, ranks: Ranks) -> Tensor:
        """L, of the features of all ranks; then ∂L/∂x is known."""
        gathered, own = ranks.gather(self.features, self.counts)
        if not self.differentiable:
            return self.objective.discrepancy(gathered)
        with torch.enable_grad():
            leaf = gathered.detach().requires_grad_()
            loss = self.objective.discrepancy(leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
        self.gradients = torch.split(gradient[own], self.sizes, dim=1)
        if not self.objective.pool.reads_pooled:
            del self.features, self.of_taps
        return loss.detach()

    def gradient(self, tap: int, images: slice) -> PerImage:
        """See `engine.representation.protocols.Criterion`."""
        pool = self.objective.pool
        pooled = self.of_taps[tap][images] if pool.reads_pooled else None
        return PerImage(*pool.gradient(self.gradients[tap][images], pooled, self.taps[tap]))


class OnFeatures(nn.Module):
    """A distance of pooled features as a loss of images.

        L = discrepancy(x),    x_n = the pooled features of image n, [F]

    Exact for any minibatch, in the extractor memory of one chunk; the price is a second forward pass where there are
    several chunks. What is remembered between two minibatches is the discrepancy's (`engine.comparison.populations`).

    Args:
        extractor: from `build_extractor`.
        discrepancy: features [N, F] → [], differentiable; for instance `engine.comparison.distances.MMD`.
        pool: a name that `make_pool` knows, or a `Pool`.
        chunk_size, kernels, amp_dtype, recompute, ranks, max_chunks: as for `MomentMatching`.

    Raises ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        extractor: Extractor,
        discrepancy: Discrepancy,
        *,
        pool: str | Pool = "mean",
        chunk_size: int | None = None,
        kernels: str | ModuleType = "auto",
        amp_dtype: torch.dtype | None = None,
        recompute: str = "none",
        ranks: Ranks = ALONE,
        max_chunks: int | None = None,
    ):
        super().__init__()
        check_whole(extractor, ranks)
        self.pool = make_pool(pool) if isinstance(pool, str) else pool
        self.discrepancy = discrepancy
        self.ranks = ranks
        self.feature_pass = FeaturePass(
            extractor,
            dtype=amp_dtype,
            chunk_size=chunk_size,
            recompute=recompute,
            kernels=kernels,
            max_chunks=max_chunks,
        )

    @property
    def extractor(self) -> Extractor:
        """The one that runs, in the arithmetic's dtype. Not a submodule: a run's state does not hold frozen weights."""
        return self.feature_pass.extractor

    def forward(self, images: Tensor) -> Tensor:
        """The loss of `images` [N, 3, H, W] in [-1, 1], a scalar."""
        self.extractor.check_images(images)
        if len(images) < 2 and self.ranks.size == 1:
            raise InputError("images", "a distance of sets needs at least 2 images")
        differentiable = torch.is_grad_enabled() and images.requires_grad
        return self.feature_pass.loss(images, FeatureCriterion(self, len(images), differentiable), self.ranks)

    def scalars(self) -> dict[str, Tensor]:
        return {}
