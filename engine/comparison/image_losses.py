"""How far drawn images are from real ones, image by image: by pixels, Laplacian pyramids, or features.

Every function takes drawn and real images [n, 3, H, W] and returns one number for each pair, [n], in float32 at least.
So ranks only add, and an image has the same number in any minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.representation.feature_pass import Chunk, FeaturePass
from engine.representation.protocols import PerImage, TapInput
from engine.support.errors import InputError
from kernels.layout import accumulation_dtype

ImageErrors = Callable[[Tensor, Tensor], Tensor]
"""Drawn and real images [n, 3, H, W] → [n], differentiable in the drawn ones."""

_SMALLEST = 4
"""Side of the coarsest level of a pyramid, by default."""
_SCALE = 2**12
"""On the way back through a network: 1/d_j alone would be nothing in float16."""


def pixel_errors(drawn: Tensor, real: Tensor) -> Tensor:
    """Σ (x − y)² over channels and pixels, [n]: −2 log N(y; x, I) but for a constant."""
    return (_wide(drawn) - _wide(real)).square().sum(dim=(1, 2, 3))


def laplacian_pyramid(images: Tensor, levels: int | None = None) -> list[Tensor]:
    """The Laplacian pyramid of images [n, C, H, W]: `levels` bands L_l, from fine to coarse, and the G_l that is left.

        G_0 = x        G_l+1 = every second pixel of w ∗ G_l        L_l = G_l − 4 w ∗ (G_l+1 with zeros between)

    w is the binomial filter (1, 4, 6, 4, 1) / 16 along columns and rows, and images are mirrored at their border pixels
    (Burt & Adelson 1983, with its a = 3/8). Linear in the images. A side s becomes ⌈s/2⌉.

    Args:
        levels: how many bands; by default as many as leave sides of at least 4.

    Raises:
        InputError: "levels", if it is below 1, or a side of fewer than 3 pixels would be halved.
    """
    side = min(images.shape[2:])
    if levels is None:
        levels = max(int(math.log2(max(side / _SMALLEST, 1))), 1)
    if levels < 1 or side <= 2**levels:  # ⌈side / 2^(levels − 1)⌉ is at least 3
        raise InputError("levels", f"must be at least 1, and fewer than log₂ of the side, {side}; got {levels}")
    found, x = [], _wide(images)
    for _ in range(levels):
        smaller = _halved(_halved(x).mT).mT
        found.append(x - _doubled(_doubled(smaller, x.shape[3]).mT, x.shape[2]).mT)
        x = smaller
    return [*found, x]


def pyramid_errors(drawn: Tensor, real: Tensor, levels: int | None = None) -> Tensor:
    """Σ_l mean |L_l(x) − L_l(y)|, the mean over the values of level l, [n]; see `laplacian_pyramid`.

    The Lap₁ of GLO (Bojanowski et al. 2018; Ling & Okada 2006), Σ_l 4^l Σ |L_l(x) − L_l(y)|, divided by the number of
    values of an image.
    """
    difference = laplacian_pyramid(_wide(drawn) - _wide(real), levels)
    return torch.stack([level.abs().mean(dim=(1, 2, 3)) for level in difference]).sum(dim=0)


class PerceptualErrors:
    """The mean |x − y| of pixels, and of every tap's features of both images, added up, [n].

        ℓ_n = 1/(3HW) Σ |x_n − y_n| + Σ_j 1/d_j Σ_d |φ_jd(x_n) − φ_jd(y_n)|

    the perceptual distance of GLANN (Hoshen et al. 2019) with the taps of any extractor. Exact for any minibatch, in
    the extractor memory of one chunk and of its features once more: a chunk's gradients are known as soon as its own
    features are, since no image's error depends on another image. The drawn images alone have a gradient; at equal
    features it is 0.

    Args:
        feature_pass: runs the extractor, with running statistics.
    """

    def __init__(self, feature_pass: FeaturePass):
        if feature_pass.extractor.batch_statistics:
            raise InputError("extractor", "batch statistics mix images, and each needs its own error")
        self.feature_pass = feature_pass

    def __call__(self, drawn: Tensor, real: Tensor) -> Tensor:
        """See the class."""
        found: Tensor = _OfFeatures.apply(drawn, real, self.feature_pass)
        return found + (_wide(drawn) - _wide(real)).abs().mean(dim=(1, 2, 3))


class _Kept:
    """The collector of real images: a chunk's features, tap by tap."""

    def __init__(self) -> None:
        self.taps: dict[int, Tensor] = {}

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        self.taps[tap] = x.activate_().clone()


class _Compared:
    """The collector of drawn ones: errors of one chunk, and the features' gradients in place of the real features.

    Args:
        errors: [n] of the chunk, added to.
    """

    def __init__(self, real: dict[int, Tensor], errors: Tensor):
        self.taps, self.errors = real, errors
        self.of_taps: dict[int, Tensor] = {}

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        y, real = x.activate_(), self.taps[tap]
        difference = y.to(self.errors.dtype) - real
        self.of_taps[tap] = difference.abs().mean(dim=(1, 2, 3))
        torch.sign(difference, out=difference)
        self.taps[tap] = difference.mul_(_SCALE / math.prod(y.shape[1:]))

    def gradient(self, tap: int) -> PerImage:
        """`_SCALE` times ∂ℓ_n/∂y_n of a tap."""
        return PerImage(self.taps[tap])

    def finish(self) -> None:
        """Add up what the taps found, in their order: networks side by side may come in any."""
        for tap in sorted(self.of_taps):
            self.errors += self.of_taps[tap]


class _OfFeatures(torch.autograd.Function):
    """Errors of features, with ∂ℓ_n/∂x_n found chunk by chunk in forward: backward is a product."""

    @staticmethod
    def forward(ctx: Any, drawn: Tensor, real: Tensor, feature_pass: FeaturePass) -> Tensor:
        needed = ctx.needs_input_grad[0]
        errors = torch.zeros(len(drawn), dtype=accumulation_dtype(feature_pass.dtype), device=drawn.device)
        gradient = torch.zeros_like(drawn) if needed else None
        for part in feature_pass.chunks(len(drawn)):
            kept = _Kept()
            feature_pass.collect(real[part], kept)
            compared = _Compared(kept.taps, errors[part])
            if gradient is None:
                feature_pass.collect(drawn[part], compared)
            else:
                chunk = Chunk(part, compared)
                graph = feature_pass.keep(drawn[part], chunk)
                chunk.gradient = compared.gradient
                gradient[part] = feature_pass.gradient(graph, chunk).to(drawn.dtype) / _SCALE
            compared.finish()
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype).view(-1, 1, 1, 1), None, None


def _halved(x: Tensor) -> Tensor:
    """Every second column of w ∗ x."""
    columns = x.shape[-1]
    padded = torch.cat((x[..., 1:3].flip(-1), x, x[..., -3:-1].flip(-1)), dim=-1)
    a, b, c, d, e = (padded[..., start : start + columns : 2] for start in range(5))
    return (a + e + 4 * (b + d) + 6 * c) / 16


def _doubled(x: Tensor, columns: int) -> Tensor:
    """2 w ∗ (x with a column of zeros after each), `columns` of them."""
    padded = torch.cat((x[..., 1:2], x, x[..., -1:] if columns % 2 == 0 else x[..., -2:-1]), dim=-1)
    before, here, after = padded[..., :-2], padded[..., 1:-1], padded[..., 2:]
    both = torch.stack(((before + 6 * here + after) / 8, (here + after) / 2), dim=-1)
    return both.flatten(-2)[..., :columns]


def _wide(images: Tensor) -> Tensor:
    return images.to(torch.promote_types(images.dtype, torch.float32))
