"""Moment matching: the loss of generative feature matching networks and its gradient (paper, sections 2.1 and 2.2)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from engine.comparison.averagers import Averager, BatchMoments, Direction, TargetMoments
from engine.comparison.distances.moments import Moments, check_fingerprint
from engine.representation.extractor import Extractor, feature_fingerprint
from engine.representation.feature_pass import FeaturePass, check_whole
from engine.representation.memory_order import FeatureOrder
from engine.representation.protocols import Affine, Ranks, TapInput
from engine.support.errors import InputError
from engine.training.ranks import ALONE
from kernels.layout import accumulation_dtype

_DEVIATION_FLOOR = 0.05
# A collective should carry enough to be worth its start: half a megabyte of means and as much of M2 in float32. And a
# pass should not start too many of them.
_LEAST_TOGETHER = 1 << 17
_MOST_GROUPS = 8


@dataclass(frozen=True)
class TapGroup:
    """Consecutive taps of one network, whose moments ranks exchange together.

    Attributes:
        taps: their numbers.
        features: where they lie among all D features.
    """

    taps: range
    features: slice


def tap_groups(networks: Sequence[range], sizes: Sequence[int], least: int | None = None) -> list[TapGroup]:
    """All taps, in order. A group ends with its network, or as soon as it has `least` features.

    Early layers have most of the features, so that what is left for the end of a network is small.

    Args:
        networks: which taps are whose.
        sizes: d_j of every tap.
        least: None for what is worth a collective, and no more than about eight of them.
    """
    least = max(_LEAST_TOGETHER, sum(sizes) // _MOST_GROUPS) if least is None else least
    bounds = [0, *itertools.accumulate(sizes)]
    groups = []
    for network in networks:
        begin = network.start
        for end in range(begin + 1, network.stop + 1):
            if end == network.stop or bounds[end] - bounds[begin] >= least:
                groups.append(TapGroup(range(begin, end), slice(bounds[begin], bounds[end])))
                begin = end
    return groups


def side_by_side(groups: Sequence[BatchMoments]) -> BatchMoments:
    """The moments of all features, from those of groups of them over the same images."""
    if len(groups) == 1:
        return groups[0]
    mean, m2 = (torch.cat([getattr(group, name) for group in groups]) for name in ("mean", "m2"))
    return BatchMoments(groups[0].count, mean, m2)


class MomentCriterion:
    """The criterion of one minibatch: moments of every tap over its chunks, one averager step, two coefficients.

    With several ranks, the moments of a group of taps start on their way to the others as soon as the last chunk has
    passed the last of these taps, and travel while the pass goes on.

    Args:
        objective: whose averager, target and buffers' order are used.
        count: images of this rank that the pass will show.
        advance: whether the averager takes a step, or is only read.

    Attributes:
        scalars: after `finish`, for the log: the loss's parts over means and over variances, and ‖Δ‖².
    """

    def __init__(self, objective: MomentMatching, count: int, advance: bool):
        self.objective, self.count, self.advance = objective, count, advance
        self.kernels: ModuleType = objective.feature_pass.kernels
        extractor = objective.feature_pass.prepared
        features, taps = extractor.num_features, len(extractor.taps)
        both = torch.empty(2 * features, dtype=objective.accumulation_dtype, device=extractor.device)
        self.buffers: tuple[Tensor, ...] = torch.split(both, features)
        slices = objective.order.slices(both)
        self.means, self.m2s = slices[:taps], slices[taps:]
        self.counts = [0] * taps
        self.merging = objective.ranks.merging(count)
        self.waiting = list(objective.groups)
        self.gradients: list[Affine] = []
        self.scalars: dict[str, Tensor] = {}

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        self.kernels.relu_moments(
            x.x, self.means[tap], self.m2s[tap], self.counts[tap], x.bias, x.residual, x.activation
        )
        self.counts[tap] += len(x.x)
        # Always in the same order, whatever order a pass goes in: a collective is a promise of all ranks.
        while self.waiting and all(self.counts[tap] == self.count for tap in self.waiting[0].taps):
            self._start(self.waiting.pop(0))

    def _start(self, group: TapGroup) -> None:
        alone = len(self.objective.groups) == 1
        mean, m2 = self.buffers if alone else (buffer[group.features] for buffer in self.buffers)
        self.merging.start(BatchMoments(self.count, mean, m2))

    def finish(self, ranks: Ranks) -> Tensor:
        """L, from the moments of all ranks; then the coefficients are known."""
        objective, order = self.objective, self.objective.order
        for group in self.waiting:  # of a rank without images
            self._start(group)
        direction: Direction = objective.averager.step(
            self.kernels,
            side_by_side(self.merging.wait()),
            objective.target,
            correction=objective.correction,
            advance=self.advance,
            weight=objective.weight,
        )
        # Backward needs the coefficients alone, which `step` made afresh.
        self.buffers, self.means, self.m2s = (), (), ()
        self.gradients = [Affine(a, b) for a, b in zip(order.slices(direction.a), order.slices(direction.b))]
        of_means, of_variances, _, _, loss, norm_squared = direction.sums.unbind()
        self.scalars = {
            "loss_mean": of_means,
            "loss_variance": of_variances,
            "difference_norm_squared": norm_squared,
        }
        return loss.to(objective.accumulation_dtype)

    def gradient(self, tap: int, images: slice) -> Affine:
        """∂L/∂x = a + b·x, the same for all images."""
        return self.gradients[tap]


class MomentMatching(nn.Module):
    """Matches the mean and the variance of every feature of generated images to those of the target.

    For a minibatch of N images with feature means m and variances s, target μ and σ, and the averager's v (detached):

        L = Σ_d v^μ_d (μ_d − m_d) + v^σ_d (σ_d − s_d)            (for `NoAverage`: L = Σ_d Δ_d², paper's equation 1)

    The gradient with respect to the images is exact and needs two coefficients per feature
    (docs/method.md, identity 1).
    Everything lives on the extractor's device; `.to()` moves nothing.

    Args:
        extractor: from `build_extractor`; float64 after `extractor.double()`.
        target: moments of the real dataset, `[D]`, in the order of `extractor.features`.
        averager: `AMA`, `MovingAverage` or `NoAverage`; its state starts anew here.
        chunk_size: images that the extractor sees at once, None for all. The result does not depend on it.
        kernels: "auto", "reference", "compiled" or "triton", or a backend itself.
        correction: c of the variances' N − c, 0 or 1, for the batch and the target alike; with a population, whose
            variances have N, for the target alone.
        amp_dtype: dtype of the extractor's arithmetic (bfloat16 or float16), None for the extractor's own. Moments,
            averager and coefficients stay in float32.
        recompute: "none", or "stages" to keep few activations for backward and compute the others again.
        ranks: the processes that share the minibatch.
        weights: `[D]`, w of every feature: match w·x in place of x (see `feature_weights`); None is the paper's 1.
        max_chunks: see `FeaturePass`.

    Raises ValueError for arguments that do not fit, InputError if the target's fingerprint is another extractor's.
    """

    def __init__(
        self,
        extractor: Extractor,
        target: Moments,
        averager: Averager,
        *,
        chunk_size: int | None = None,
        kernels: str | ModuleType = "auto",
        correction: int = 1,
        amp_dtype: torch.dtype | None = None,
        recompute: str = "none",
        ranks: Ranks = ALONE,
        weights: Tensor | None = None,
        max_chunks: int | None = None,
    ):
        super().__init__()
        if correction not in (0, 1):
            raise InputError("correction", f"must be 0 or 1, got {correction}")
        if target.num_features != extractor.num_features:
            raise InputError(
                "target", f"has {target.num_features} features, the extractor {extractor.name} {extractor.num_features}"
            )
        if weights is not None and weights.shape != (extractor.num_features,):
            raise InputError("weights", f"must be [{extractor.num_features}], got {list(weights.shape)}")
        check_whole(extractor, ranks)
        if target.fingerprint is not None:
            check_fingerprint(feature_fingerprint(extractor, amp_dtype), target.fingerprint, "target")
        self.averager = averager
        self.correction = correction
        self.ranks = ranks
        self.feature_pass = FeaturePass(
            extractor,
            dtype=amp_dtype,
            chunk_size=chunk_size,
            recompute=recompute,
            kernels=kernels,
            max_chunks=max_chunks,
        )
        self.order = FeatureOrder(extractor.taps)
        # Alone there is nothing to wait for, and one group of all taps costs nothing.
        everything = [range(len(extractor.taps))] if ranks.size == 1 else self.feature_pass.prepared.taps_of_networks()
        least = extractor.num_features if ranks.size == 1 else None
        self.groups = tap_groups(everything, self.order.sizes, least)
        self.accumulation_dtype = accumulation_dtype(self.feature_pass.dtype)
        dtype, device = self.accumulation_dtype, extractor.device
        self.target = TargetMoments(
            self.order.to_memory(target.mean).to(device, dtype),
            self.order.to_memory(target.variance(correction)).to(device, dtype),
        )
        self.weight: Tensor | None = None
        if weights is not None:
            self.weight = self.order.to_memory(weights).to(device, dtype)
        averager.reset(extractor.num_features, dtype=dtype, device=device)
        for name in averager.state_names:
            setattr(averager, name, self.order.to_memory(getattr(averager, name)))
        self._scalars: dict[str, Tensor] = {}

    @property
    def extractor(self) -> Extractor:
        """The one that runs, in the arithmetic's dtype. Not a submodule: a run's state does not hold frozen weights."""
        return self.feature_pass.extractor

    @property
    def kernels(self) -> ModuleType:
        """The backend of the fused kernels."""
        return self.feature_pass.kernels

    def forward(self, images: Tensor) -> Tensor:
        """The loss of `images` [N, 3, H, W] in [-1, 1], a scalar.

        In train mode with grad enabled the averager takes one step; otherwise its state is only read.
        """
        self.extractor.check_images(images)
        if len(images) < 2 and self.ranks.size == 1:
            raise InputError("images", "a minibatch of 1 has no variance; give at least 2 images")
        count = sum(part.stop - part.start for part in self.feature_pass.chunks(len(images)))
        criterion = MomentCriterion(self, count, advance=self.training and torch.is_grad_enabled())
        loss = self.feature_pass.loss(images, criterion, self.ranks)
        self._scalars = criterion.scalars
        return loss

    def scalars(self) -> dict[str, Tensor]:
        """Of the last call: the loss's parts over means and over variances, and ‖Δ‖²."""
        return dict(self._scalars)

    def load_state_dict(  # type: ignore[override]
        self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> None:
        """Restore what `state_dict` returned; ValueError if it is another averager's or another extractor's.

        That is a copy of the averager's state in public order: `averager.v` (and m, u) [2, D], `averager.steps`.
        """
        expected = {f"averager.{name}" for name in (*self.averager.state_names, "steps")}
        if set(state) != expected:
            raise InputError(
                "state", f"has {', '.join(sorted(state))}; this averager has {', '.join(sorted(expected))}"
            )
        for name in self.averager.state_names:
            own, given = getattr(self.averager, name), state[f"averager.{name}"]
            if given.shape != own.shape:
                raise InputError("state", f"averager.{name} is {list(given.shape)}, expected {list(own.shape)}")
        for name in self.averager.state_names:
            getattr(self.averager, name).copy_(self.order.to_memory(state[f"averager.{name}"]))
        self.averager.steps.copy_(state["averager.steps"])

    # The two hooks through which PyTorch saves and loads a module, alone or inside another one.

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        for name in self.averager.state_names:
            destination[f"{prefix}averager.{name}"] = self.order.to_public(getattr(self.averager, name))
        destination[f"{prefix}averager.steps"] = self.averager.steps.clone()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            self.load_state_dict(own)
        except ValueError as error:
            error_msgs.append(f"{prefix}{error}")


def feature_weights(target: Moments, correction: int = 1) -> Tensor:
    """`[D]` float64, w_d = 1/(σ_d + 0.05·mean σ), with the deviations σ of the target.

    The averager sees w·Δ^μ and w²·Δ^σ, as if every feature were multiplied by w. Features of networks that were not
    trained on the images at hand differ in scale by orders of magnitude, and the largest few would be all that is
    matched. ValueError if no feature of the target varies.
    """
    deviation = target.variance(correction).sqrt()
    mean = deviation.mean()
    if not mean > 0:
        raise InputError("target", "no feature of the target varies, so there is nothing to scale by")
    return 1 / (deviation + _DEVIATION_FLOOR * mean)
