"""An objective of one's own: absolute differences of moments, which no large feature can dominate.

    python examples/own_objective.py

        L = Σ_d |m_d − μ_d| + |s_d − σ_d|          m, s: mean and variance of feature d over the minibatch
                                                   μ, σ: over all real images
Once a minibatch's moments are known, the gradient of every feature is affine in it, so two numbers per feature are all
that backward needs, for any minibatch in chunks of any size:

        ∂L/∂y_nd = a_d + b_d · y_nd                b_d = 2 sign(s_d − σ_d)/N,  a_d = sign(m_d − μ_d)/N − b_d m_d

A distance of whole feature vectors is shorter still: give `engine.comparison.on_features.OnFeatures` a function.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

from engine import Moments, build_extractor
from engine.comparison.reference.statistics_pass import compute_reference
from engine.comparison.reference.target import MomentsKind
from engine.generation.networks import build_generator
from engine.generation.priors import Gaussian, Noise
from engine.methods.matching import Matching
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.memory_order import FeatureOrder
from engine.representation.protocols import Affine, Ranks, TapInput
from pipelines import ImageLoader, open_dataset


class AbsoluteDifferences:
    """The criterion of one minibatch. The pass calls `collect` at every tap, `finish` once, `gradient` in backward."""

    def __init__(self, real: list[tuple[Tensor, Tensor]], dtype: torch.dtype):
        self.real, self.dtype = real, dtype
        self.moments = [Moments.of(mean.new_empty(0, len(mean))) for mean, _ in real]
        self.gradients: list[Affine] = []

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """Once for every tap of every chunk."""
        y = x.activate_().permute(0, 2, 3, 1).flatten(1)  # [n, d_j] in the order (H, W, C), which coefficients have
        self.moments[tap] = self.moments[tap].merge(Moments.of(y))

    def finish(self, ranks: Ranks) -> Tensor:
        """L, and all that `gradient` has to know."""
        loss = torch.zeros((), dtype=torch.float64)
        for own, (mean, variance) in zip(self.moments, self.real):
            batch = ranks.merge(own)  # with the images of the other processes, if there are any
            of_mean, of_variance = batch.mean - mean, batch.variance(correction=0) - variance
            loss += of_mean.abs().sum() + of_variance.abs().sum()
            b = 2 * of_variance.sign() / batch.count
            a = of_mean.sign() / batch.count - b * batch.mean
            self.gradients.append(Affine(a.to(self.dtype), b.to(self.dtype)))
        return loss.to(self.dtype)

    def gradient(self, tap: int, images: slice) -> Affine:
        """The same for all images."""
        return self.gradients[tap]


class AbsoluteMoments(nn.Module):
    """The objective: images → loss. Chunks, memory, masks and recomputation are the business of `FeaturePass`."""

    def __init__(self, extractor: Extractor, target: Moments, chunk_size: int | None = None):
        super().__init__()
        self.feature_pass = FeaturePass(extractor, chunk_size=chunk_size, kernels="reference")  # nothing to compile
        order = FeatureOrder(extractor.taps)
        of_taps = (order.slices(order.to_memory(values)) for values in (target.mean, target.variance(correction=0)))
        self.real = list(zip(*of_taps))  # (μ, σ) of every tap

    def forward(self, images: Tensor) -> Tensor:
        """L of `images` [N, 3, H, W]."""
        return self.feature_pass.loss(images, AbsoluteDifferences(self.real, self.feature_pass.dtype))

    def scalars(self) -> dict[str, Tensor]:
        """Nothing for the log besides the loss."""
        return {}


def error_of_the_gradient(extractor: Extractor, target: Moments) -> float:
    """How far ∂L/∂images is from autograd's of the formula on `extractor.features`, in float64, relatively."""
    extractor = copy.deepcopy(extractor).double()
    images = torch.rand(7, 3, 32, 32, dtype=torch.float64).mul(2).sub(1).requires_grad_()
    (ours,) = torch.autograd.grad(AbsoluteMoments(extractor, target, chunk_size=3)(images), images)
    variance, mean = torch.var_mean(extractor.features(images), dim=0, correction=0)
    loss = (mean - target.mean).abs().sum() + (variance - target.variance(correction=0)).abs().sum()
    (autograd,) = torch.autograd.grad(loss, images)
    return float((ours - autograd).norm() / autograd.norm())


def main() -> None:
    """Check the gradient, then train a generator of digits for a few steps."""
    parser = argparse.ArgumentParser(description="Train for a few steps on an objective of one's own.")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: 40)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    extractor = build_extractor("vgg-small", image_size=32, layers=2)  # random weights: enough to see it work
    digits = ImageLoader(open_dataset("digits", image_size=32), 256, backend="torch")
    target = compute_reference(MomentsKind(), extractor, digits, kernels="reference", progress=False)
    print(f"gradient: differs from autograd's by {error_of_the_gradient(extractor, target):.1e}")

    generator = build_generator("dcgan", image_size=32)
    objective = AbsoluteMoments(extractor, target, chunk_size=16)
    method = Matching(generator, Gaussian(100), objective, batch_size=32, lr=1e-3)
    noise = Noise(seed=0)
    losses = [float(method.step(None, noise)["loss"]) for _ in range(arguments.steps)]
    print(f"loss: {losses[0]:.1f} at step 1, {losses[-1]:.1f} at step {len(losses)}")


if __name__ == "__main__":
    main()
