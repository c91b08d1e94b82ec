"""Moment matching: the loss of generative feature matching networks and its gradient (paper, sections 2.1 and 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor, nn

import kernels as kernel_backends
from engine.comparison.averagers import Averager, BatchMoments, Direction, TargetMoments
from engine.comparison.distances.moments import Moments, check_fingerprint
from engine.representation.extractor import Extractor, Tap
from engine.representation.feature_pass import FeaturePass
from engine.representation.tracing.tap import activate_
from kernels.layout import accumulation_dtype

FEATURE_SCALES = ("none", "target-deviation")
_DEVIATION_FLOOR = 0.05


class FeatureOrder:
    """Where each tap's features lie in a flat `[D]` buffer, and the way between the two orders of a tap.

    Kernels keep every tap in the memory order of its activations, (H, W, C); everything public is in (C, H, W).
    """

    def __init__(self, taps: tuple[Tap, ...]):
        self.taps = taps
        self.sizes = [tap.num_features for tap in taps]

    def slices(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """Views of `buffer` [D], one per tap."""
        return buffer.split(self.sizes)

    def to_memory(self, public: Tensor) -> Tensor:
        """[..., D] in public order to memory order."""
        return torch.cat(
            [
                part.unflatten(-1, tap.shape).movedim(-3, -1).flatten(-3)
                for part, tap in zip(public.split(self.sizes, dim=-1), self.taps, strict=True)
            ],
            dim=-1,
        )

    def to_public(self, memory: Tensor) -> Tensor:
        """[..., D] in memory order to public order."""
        return torch.cat(
            [
                part.unflatten(-1, (*tap.shape[1:], tap.shape[0])).movedim(-1, -3).flatten(-3)
                for part, tap in zip(memory.split(self.sizes, dim=-1), self.taps, strict=True)
            ],
            dim=-1,
        )


class MomentCollector:
    """Accumulates the moments of every tap over the chunks of one minibatch, in memory order."""

    def __init__(self, extractor: Extractor, order: FeatureOrder, kernels: ModuleType, dtype: torch.dtype):
        self.kernels = kernels
        self.activations = [site.activation for site in extractor.sites]
        self.to_apply = [site.to_apply for site in extractor.sites]
        self.mean = torch.empty(extractor.num_features, dtype=dtype, device=extractor.device)
        self.m2 = torch.empty_like(self.mean)
        self.means, self.m2s = order.slices(self.mean), order.slices(self.m2)
        self.counts = [0] * len(self.activations)

    def collect(self, tap: int, y: Tensor, residual: Tensor | None) -> None:
        """See `engine.representation.feature_pass.Collector`."""
        self.kernels.relu_moments(
            y, self.means[tap], self.m2s[tap], self.counts[tap], None, residual, self.to_apply[tap]
        )
        self.counts[tap] += len(y)

    @property
    def count(self) -> int:
        """Images seen by every tap."""
        return self.counts[0]


class _Matching(MomentCollector):
    """The criterion of one call of `MomentMatching`."""

    def __init__(self, objective: MomentMatching, advance: bool):
        super().__init__(
            objective.feature_pass.prepared, objective.order, objective.kernels, objective.accumulation_dtype
        )
        self.objective = objective
        self.advance = advance
        self.direction: Direction | None = None

    def activate(self, tap: int, y: Tensor, residual: Tensor | None) -> None:
        activate_(y, residual, self.to_apply[tap])

    def finish(self) -> Tensor:
        objective = self.objective
        self.direction = objective.averager.step(
            objective.kernels,
            BatchMoments(self.count, self.mean, self.m2),
            objective.target,
            correction=objective.correction,
            advance=self.advance,
            weight=objective.weight,
        )
        # Backward needs the coefficients alone, which `step` made afresh.
        del self.mean, self.m2, self.means, self.m2s
        objective.sums = self.direction.sums
        return self.direction.sums[:2].sum().to(objective.accumulation_dtype)

    def scale(self, grad_loss: Tensor) -> None:
        assert self.direction is not None
        # In float32, before anything is stored in a low dtype: coefficients near 1e-7 would underflow in float16.
        order = self.objective.order
        self.a = order.slices(self.direction.a * grad_loss)
        self.b = order.slices(self.direction.b * grad_loss)

    def gradient(self, tap: int, grad: Tensor, y: Tensor) -> None:
        self.kernels.relu_moments_backward(grad, y, self.a[tap], self.b[tap], self.activations[tap])


class MomentMatching(nn.Module):
    """Matches the mean and the variance of every feature of generated images to those of the target.

    For a minibatch of N images with feature means m and variances s, target μ and σ, and the averager's v (detached):

        L = Σ_d v^μ_d (μ_d − m_d) + v^σ_d (σ_d − s_d)            (for `NoAverage`: L = Σ_d Δ_d², paper's equation 1)

    The gradient with respect to the images is exact and needs two coefficients per feature (DESIGN, identity 1).
    Everything lives on the extractor's device; `.to()` moves nothing.

    Args:
        extractor: from `build_extractor`; float64 after `extractor.double()`.
        target: moments of the real dataset, `[D]`, in the order of `extractor.features`.
        averager: `AMA`, `MovingAverage` or `NoAverage`; its state starts anew here.
        chunk_size: images that the extractor sees at once, None for all. The result does not depend on it.
        kernels: "auto", "reference", "compiled" or "triton".
        correction: c of the variances' N − c, 0 or 1, for the batch and the target alike.
        feature_scale: "none" (the paper), or "target-deviation": match w·x for every feature x, with `feature_weights`.
        checkpoint: "none", or "stages" to keep few activations for backward and compute the others again.
        amp_dtype: dtype of the extractor's arithmetic (bfloat16 or float16), None for the extractor's own. Moments,
            averager and coefficients stay in float32.

    Raises ValueError for arguments that do not fit, InputError if the target's fingerprint is another extractor's.
    """

    def __init__(
        self,
        extractor: Extractor,
        target: Moments,
        averager: Averager,
        *,
        chunk_size: int | None = None,
        kernels: str = "auto",
        correction: int = 1,
        feature_scale: str = "none",
        amp_dtype: torch.dtype | None = None,
        checkpoint: str = "none",
        process_group: None = None,
    ):
        super().__init__()
        if correction not in (0, 1):
            raise ValueError(f"correction: must be 0 or 1, got {correction}")
        if feature_scale not in FEATURE_SCALES:
            raise ValueError(f"feature_scale: {feature_scale!r} is not one of {', '.join(FEATURE_SCALES)}")
        if target.num_features != extractor.num_features:
            raise ValueError(
                f"target: has {target.num_features} features, the extractor {extractor.name} {extractor.num_features}"
            )
        if process_group is not None:
            raise ValueError("process_group: training over several ranks is not there yet")
        if target.fingerprint is not None:
            check_fingerprint(target_fingerprint(extractor, amp_dtype), target.fingerprint, "target")
        self.averager = averager
        self.correction = correction
        self.feature_pass = FeaturePass(extractor, dtype=amp_dtype, chunk_size=chunk_size, checkpoint=checkpoint)
        self.kernels = kernel_backends.select(kernels, extractor.device, self.feature_pass.dtype)
        self.order = FeatureOrder(extractor.taps)
        self.accumulation_dtype = accumulation_dtype(self.feature_pass.dtype)
        dtype, device = self.accumulation_dtype, extractor.device
        self.target = TargetMoments(
            self.order.to_memory(target.mean).to(device, dtype),
            self.order.to_memory(target.variance(correction)).to(device, dtype),
        )
        self.weight: Tensor | None = None
        if feature_scale == "target-deviation":
            self.weight = self.order.to_memory(feature_weights(target, correction)).to(device, dtype)
        averager.reset(extractor.num_features, dtype=dtype, device=device)
        for name in averager.state_names:
            setattr(averager, name, self.order.to_memory(getattr(averager, name)))
        # (loss over means, loss over variances, ‖Δ^μ‖², ‖Δ^σ‖²) of the last call, on the device.
        self.sums = torch.zeros(4, dtype=torch.float64)

    @property
    def extractor(self) -> Extractor:
        """The one that runs, in the arithmetic's dtype. Not a submodule: a run's state does not hold frozen weights."""
        return self.feature_pass.extractor

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of `images` [N, 3, H, W] in [-1, 1], a scalar.

        In train mode with grad enabled the averager takes one step; otherwise its state is only read.
        """
        if labels is not None:
            raise ValueError("labels: moments per class are not there yet")
        self.extractor.check_images(images)
        if len(images) < 2:
            raise ValueError("images: a minibatch of 1 has no variance; give at least 2 images")
        advance = self.training and torch.is_grad_enabled()
        return self.feature_pass.loss(images, _Matching(self, advance))

    def load_state_dict(self, state: Mapping[str, Tensor], *args, **kwargs) -> None:  # type: ignore[override]
        """Restore what `state_dict` returned; ValueError if it is another averager's or another extractor's.

        That is a copy of the averager's state in public order: `averager.v` (and m, u) [2, D], `averager.steps`.
        """
        expected = {f"averager.{name}" for name in (*self.averager.state_names, "steps")}
        if set(state) != expected:
            raise ValueError(f"state: has {', '.join(sorted(state))}; this averager has {', '.join(sorted(expected))}")
        for name in self.averager.state_names:
            own, given = getattr(self.averager, name), state[f"averager.{name}"]
            if given.shape != own.shape:
                raise ValueError(f"state: averager.{name} is {list(given.shape)}, expected {list(own.shape)}")
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
        local_metadata: dict,
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
        raise ValueError("feature_scale: no feature of the target varies, so there is nothing to scale by")
    return 1 / (deviation + _DEVIATION_FLOOR * mean)


def target_fingerprint(extractor: Extractor, amp_dtype: torch.dtype | None) -> dict[str, str]:
    """What of extractor and precision decides the features; a target must have been computed with the same."""
    precision = str(amp_dtype or extractor.dtype).removeprefix("torch.")
    return {**extractor.fingerprint, "precision": precision}
