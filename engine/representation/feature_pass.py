"""The pass over the features: chunks, precision, memory, masks. It knows no loss.

What to do with the features is a criterion's business (`engine.representation.protocols`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import kernels as kernel_backends
from engine.representation.extractor import Extractor
from engine.representation.protocols import ALONE, Affine, Collector, Criterion, PerImage, Ranks, TapInput
from engine.representation.tracing.tap import TapSite, Visitor, mask_
from engine.support.errors import InputError
from kernels.layout import is_channels_last

RECOMPUTE = ("none", "stages")


class _Activate:
    """The collector of a second forward pass: features, and nothing else."""

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        x.activate_()


_ACTIVATE = _Activate()


def _unknown(tap: int) -> Affine | PerImage:
    raise RuntimeError("the gradient is known once backward begins")


class Chunk:
    """One chunk on its way through the extractor and back.

    Attributes:
        images: which of the minibatch's images they are.
        collector: who sees the features.
        gradient: of the loss with respect to a tap's features, known once backward begins.
    """

    def __init__(self, images: slice, collector: Collector):
        self.images, self.collector = images, collector
        self.gradient: Callable[[int], Affine | PerImage] = _unknown


class FeaturePass:
    """Runs an extractor over a minibatch in chunks, forward once and backward once per chunk.

    With one chunk the graph of the forward pass is kept for backward. With several, the first pass keeps nothing and
    backward computes each chunk again, so that extractor memory is that of one chunk (docs/method.md, identity 3).
    With `recompute="stages"` even a chunk's own graph is never whole: the forward pass keeps the inputs of a few stages
    of layers, and backward computes one stage after the other again, from the last to the first.

    Args:
        extractor: any; a copy in `dtype` is made if its own dtype is another.
        dtype: of the extractor's arithmetic, None for the extractor's own.
        chunk_size: images in a chunk, None for the whole minibatch.
        recompute: "none", or "stages" to keep the inputs of stages alone.
        kernels: a backend's name (see `kernels.select`), or the backend itself.
        max_chunks: leave out all further chunks of a minibatch; for models of a step's memory, never for training.

    Attributes:
        extractor: the given one, or its copy.
        prepared: the extractor as it runs, with sites of its own (see `Extractor.prepared`).
        kernels: the backend.
    """

    def __init__(
        self,
        extractor: Extractor,
        *,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        recompute: str = "none",
        kernels: str | ModuleType = "auto",
        max_chunks: int | None = None,
    ):
        if recompute not in RECOMPUTE:
            raise InputError("recompute", f"{recompute!r} is not one of {', '.join(RECOMPUTE)}")
        if chunk_size is not None and chunk_size < 1:
            raise InputError("chunk_size", f"must be at least 1, got {chunk_size}")
        if chunk_size is not None and extractor.batch_statistics:
            raise InputError("chunk_size", 'batch statistics (bn="batch") need the whole minibatch at once')
        self.dtype = dtype or extractor.dtype
        self.chunk_size, self.max_chunks = chunk_size, max_chunks
        self.extractor = extractor if self.dtype == extractor.dtype else copy.deepcopy(extractor).to(self.dtype)
        self.prepared = self.extractor.prepared()
        self.stages = self.prepared.stages() if recompute == "stages" else None
        self.kernels = _backend(kernels, extractor.device, self.dtype) if isinstance(kernels, str) else kernels

    def loss(self, images: Tensor, criterion: Criterion, ranks: Ranks = ALONE) -> Tensor:
        """The criterion's loss of `images` [N, 3, H, W], differentiable with respect to the images."""
        differentiable = torch.is_grad_enabled() and images.requires_grad
        return _MinibatchPass.apply(images, self, criterion, ranks, differentiable)

    def collect(self, images: Tensor, collector: Collector) -> None:
        """The first half alone: `collector.collect` at every tap of every chunk; nothing is kept."""
        with torch.no_grad():
            for part in self.chunks(len(images)):
                self._run(images[part], Chunk(part, collector))

    def chunks(self, count: int) -> Iterator[slice]:
        """Slices of a minibatch of `count` images, `chunk_size` at a time."""
        size = self.chunk_size or max(count, 1)
        starts = range(0, count, size)
        return (slice(start, min(start + size, count)) for start in starts[: self.max_chunks])

    def _run(self, images: Tensor, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        """Run one chunk. Returns the leaf whose gradient is wanted, and one token per tap to start backward from."""
        tokens: list[Tensor] = []
        leaf = self._leaf(images).requires_grad_(torch.is_grad_enabled())
        with torch.autocast(leaf.device.type, enabled=False):
            self.prepared(leaf, self._visitor(chunk, tokens))
        return leaf, tokens

    def _sweep(self, images: Tensor, chunk: Chunk) -> list[list[Tensor]]:
        """Run one chunk stage by stage without a graph. Returns the input of every stage of every network."""
        assert self.stages is not None
        inputs: list[list[Tensor]] = []
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            visit, leaf = self._visitor(chunk, []), self._leaf(images)
            for stages in self.stages:
                x, kept = leaf, []
                for stage in stages:
                    kept.append(x)
                    x = stage(x, visit)
                inputs.append(kept)
        return inputs

    def _gradient_of_sweep(self, inputs: list[list[Tensor]], chunk: Chunk) -> Tensor:
        """∂L/∂chunk from what `_sweep` returned, which is used up: every stage is computed again, and then backward."""
        assert self.stages is not None
        chunk.collector = _ACTIVATE
        gradients: list[Tensor] = []
        for stages, kept in zip(reversed(self.stages), reversed(inputs), strict=True):
            gradient: Tensor | None = None
            for stage in reversed(stages):
                tokens: list[Tensor] = []
                leaf = kept.pop().detach().requires_grad_()
                with torch.enable_grad(), torch.autocast(leaf.device.type, enabled=False):
                    y = stage(leaf, self._visitor(chunk, tokens))
                gradient = _gradient(leaf, tokens, None if gradient is None else (y, gradient))
                del leaf, y, tokens
            assert gradient is not None
            gradients.append(gradient)
        return gradients[0] if len(gradients) == 1 else torch.stack(gradients).sum(dim=0)

    def keep(self, images: Tensor, chunk: Chunk) -> Any:
        """Run one chunk and return what `gradient` needs: its graph, or with stages their inputs."""
        if self.stages is not None:
            return self._sweep(images, chunk)
        with torch.enable_grad():
            return self._run(images, chunk)

    def gradient(self, kept: Any, chunk: Chunk) -> Tensor:
        """∂L/∂chunk from what `keep` returned, which is used up; `chunk.gradient` must be known."""
        return _gradient(*kept) if self.stages is None else self._gradient_of_sweep(kept, chunk)

    def _leaf(self, images: Tensor) -> Tensor:
        return images.detach().to(self.dtype, memory_format=torch.channels_last)

    def _visitor(self, chunk: Chunk, tokens: list[Tensor]) -> Visitor:
        sites = self.prepared.sites

        def visit(index: int, x: Tensor, residual: Tensor | None) -> Tensor:
            site = sites[index]
            if not is_channels_last(x):
                x = x.contiguous(memory_format=torch.channels_last)
            elif not site.owns_input:
                x = x.clone(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            if not torch.is_grad_enabled():
                chunk.collector.collect(index, TapInput(x, residual, site.to_apply), chunk.images)
                return x
            y, token = _Tap.apply(x, residual, site, chunk, self.kernels)
            tokens.append(token)
            return y

        return visit


def _backend(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    try:
        return kernel_backends.select(name, device, dtype)
    except ValueError as error:
        raise InputError("kernels", str(error).removeprefix("kernels: ")) from None


class _Tap(torch.autograd.Function):
    """One tap inside a chunk: the activation in place, and in backward the criterion's gradient and the mask.

    Returns (y, token). Nothing is computed from the token: it is the criterion's own way out of the graph, so that
    backward can start at every tap, the last one included, without a tensor of zeros.
    """

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, site: TapSite, chunk: Chunk, kernels: ModuleType):
        chunk.collector.collect(site.index, TapInput(x, residual, site.to_apply), chunk.images)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.site, ctx.chunk, ctx.kernels = site, chunk, kernels
        ctx.has_residual = residual is not None
        return x, x.new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor | None, token: Tensor | None):
        (y,) = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(y)
        elif not ctx.site.owns_gradient or grad.stride() != y.stride():
            grad = torch.empty_like(y).copy_(grad)
        own = ctx.chunk.gradient(ctx.site.index)
        if isinstance(own, Affine):
            ctx.kernels.relu_moments_backward(grad, y, own.a, own.b, ctx.site.activation)
        else:
            grad.copy_(grad + own.g)  # the sum in float32, if it is stored in less
            mask_(grad, y, ctx.site.activation)
        return grad, grad if ctx.has_residual else None, None, None, None


class _MinibatchPass(torch.autograd.Function):
    """The whole minibatch as one node: forward collects and finishes, backward runs the chunks' own graphs."""

    @staticmethod
    def forward(ctx, images: Tensor, feature_pass: FeaturePass, criterion: Criterion, ranks: Ranks, keep: bool):
        ctx.feature_pass, ctx.criterion, ctx.kept = feature_pass, criterion, None
        parts = list(feature_pass.chunks(len(images)))
        if not keep or len(parts) > 1:
            feature_pass.collect(images, criterion)
        else:
            chunk = Chunk(parts[0], criterion)
            ctx.kept = (feature_pass.keep(images, chunk), chunk)
        if keep:
            ctx.save_for_backward(images)
        return criterion.finish(ranks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor):
        (images,) = ctx.saved_tensors
        feature_pass, criterion = ctx.feature_pass, ctx.criterion
        gradients = _Gradients(criterion, len(feature_pass.prepared.sites), grad_loss)
        if ctx.kept is not None:
            kept, ctx.kept = ctx.kept, ()
            if not kept:
                raise RuntimeError("loss: backward a second time; the pass over the features keeps nothing after one")
            graph, chunk = kept
            chunk.gradient = gradients.of(chunk.images)
            return feature_pass.gradient(graph, chunk).to(images.dtype), None, None, None, None
        gradient = torch.empty_like(images)
        for part in feature_pass.chunks(len(images)):
            chunk = Chunk(part, _ACTIVATE)
            graph = feature_pass.keep(images[part], chunk)
            chunk.gradient = gradients.of(part)
            gradient[part] = feature_pass.gradient(graph, chunk)
        return gradient, None, None, None, None


class _Gradients:
    """A criterion's gradients times the upstream gradient of the loss.

    The product is taken in the criterion's own dtype, before anything is stored in a low one: coefficients near 1e-7
    would underflow in float16.
    """

    def __init__(self, criterion: Criterion, taps: int, grad_loss: Tensor):
        self.criterion, self.taps, self.grad_loss = criterion, taps, grad_loss
        self.affine: list[Affine] = []

    def of(self, images: slice) -> Callable[[int], Affine | PerImage]:
        """For the images of one chunk, a function of the tap; what is as large as a tap is made when it is needed."""
        return functools.partial(self._of, images)

    def _of(self, images: slice, tap: int) -> Affine | PerImage:
        if self.affine:
            return self.affine[tap]
        own = self.criterion.gradient(tap, images)
        if isinstance(own, PerImage):
            return PerImage(own.g * self.grad_loss)
        # The same for all chunks, and two values for each feature: all taps at once, in one operation.
        found = (self.criterion.gradient(tap, images) for tap in range(self.taps))
        pairs = [pair for pair in found if isinstance(pair, Affine)]
        scaled = iter(torch._foreach_mul([part for pair in pairs for part in (pair.a, pair.b)], self.grad_loss))
        self.affine = [Affine(next(scaled), next(scaled)) for _ in pairs]
        return self.affine[tap]


def _gradient(leaf: Tensor, tokens: list[Tensor], output: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The gradient of the criterion, and of an (output, its gradient) besides, with respect to `leaf`."""
    ends, gradients = [*tokens], [torch.zeros_like(token) for token in tokens]
    if output is not None:
        ends.append(output[0])
        gradients.append(output[1])
    (gradient,) = torch.autograd.grad(ends, leaf, gradients)
    return gradient
