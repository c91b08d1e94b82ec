"""The objective written out in float64 with plain autograd and `torch.optim.Adam`: what the engine is compared with.

Nothing here imports `kernels`, the averagers or `MomentMatching`. Features come from `extractor.features`, or, for
networks that a test makes itself, from forward hooks on the untraced network (`hooked_features`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor

Features = Callable[[Tensor], Tensor]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; infinite if either has a value that is not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(found.shape)} and {tuple(expected.shape)}")
    error = float((found - expected).norm())
    return error / max(float(expected.norm()), 1e-300) if error == error else float("inf")


def batch_moments(features: Tensor, correction: int) -> Tensor:
    """`[2, D]`: mean and variance of every feature of `features` [N, D], differentiable."""
    variance, mean = torch.var_mean(features, dim=0, correction=correction)
    return torch.stack((mean, variance))


@dataclass
class WrittenOut:
    """The objective of one run, step by step, as the paper and the authors' code have it.

    Attributes:
        features: images [N, 3, H, W] float64 → [N, D], differentiable.
        target: [2, D], mean and variance of the real data.
        averager: "ama", "ama-authors", "ma", "ma-authors" or "none".
        rate: lr of AMA, α of the moving averages.
        start: [2, D], v before the first step (AMA only).
    """

    features: Features
    target: Tensor
    averager: str
    rate: float
    correction: int = 1
    start: Tensor | None = None
    v: Tensor | None = None
    adam: torch.optim.Adam | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.averager.startswith("ama"):
            start = torch.zeros_like(self.target) if self.start is None else self.start
            self.v = nn.Parameter(start.detach().double().clone())
            beta1 = 0.5 if self.averager == "ama-authors" else 0.9
            self.adam = torch.optim.Adam([self.v], lr=self.rate, betas=(beta1, 0.999), eps=1e-8)
        elif self.averager == "ma":
            self.v = torch.zeros_like(self.target)

    def __call__(self, images: Tensor) -> Tensor:
        """The loss of one training step on `images` (after the averager's step)."""
        found = batch_moments(self.features(images), self.correction)
        difference = self.target - found
        if self.adam is not None:
            assert self.v is not None
            inner = (self.v - difference.detach()).square()
            # The authors take nn.MSELoss of mean and of variance apart, so each is a mean over D features.
            self.adam.zero_grad()
            (inner.mean(dim=1).sum() if self.averager == "ama-authors" else 0.5 * inner.sum()).backward()
            self.adam.step()
            return (self.v.detach() * difference).sum()
        if self.averager == "ma":
            assert self.v is not None
            self.v = (1 - self.rate) * self.v + self.rate * difference.detach()
            return (self.v * difference).sum()
        if self.averager == "ma-authors":
            before = found.detach() if self.v is None else self.v
            average = (1 - self.rate) * before + self.rate * found
            self.v = average.detach()
            return F.mse_loss(average[0], self.target[0]) + F.mse_loss(average[1], self.target[1])
        return difference.square().sum()

    def gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, ∂L/∂images) of one training step."""
        images = images.detach().double().requires_grad_()
        loss = self(images)
        (gradient,) = torch.autograd.grad(loss, images)
        return loss.detach(), gradient

    def state(self) -> dict[str, Tensor]:
        """Averager state under the names of `MomentMatching.state_dict`, in the order of `features`."""
        if self.adam is not None:
            inner = self.adam.state[self.v]
            # Adam's own gradient is 2/D of v − Δ in the authors' mean; the engine keeps m and u in units of Δ.
            scale = self.target.shape[1] / 2 if self.averager == "ama-authors" else 1.0
            assert self.v is not None
            return {
                "averager.v": self.v.detach(),
                "averager.m": inner["exp_avg"] * scale,
                "averager.u": inner["exp_avg_sq"] * scale**2,
                "averager.steps": inner["step"],
            }
        return {} if self.v is None else {"averager.v": self.v}


def in_float64(extractor: Extractor) -> Extractor:
    """A float64 copy, made by PyTorch's own conversion."""
    return copy.deepcopy(extractor).double()


def tapped(network: nn.Module, image_size: int) -> Extractor:
    """Extractor of one network of a test's own, float32, all activations tapped."""
    return build_extractor("own", module=network, image_size=image_size)


def hooked_features(network: nn.Module, activations: Sequence[nn.Module]) -> Features:
    """Features of the network as it was written, in float64: hooks collect the outputs of `activations` as they run.

    Every activation must be one that the result depends on, and run once.
    """
    plain = copy.deepcopy(network)
    names = {module: name for name, module in network.named_modules()}
    hooked = [plain.get_submodule(names[module]) for module in activations]
    plain.double().eval().requires_grad_(False)
    taps: list[Tensor] = []
    for module in hooked:
        module.register_forward_hook(lambda module, args, output: taps.append(output))

    def features(images: Tensor) -> Tensor:
        taps.clear()
        plain(images)
        result = torch.cat([tap.flatten(1) for tap in taps], dim=1)
        taps.clear()
        return result

    return features
