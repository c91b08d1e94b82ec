"""The pass over the features: chunks, precision and memory. It knows nothing of moments.

What to do at each tap is a `Criterion`'s business: `engine.comparison.moment_matching` is the first one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.representation.extractor import Extractor
from engine.representation.tracing.tap import Visitor
from kernels.layout import is_channels_last

CHECKPOINTS = ("none", "stages")
# What happens at a tap: (index, y, residual), in place.
AtTap = Callable[[int, Tensor, "Tensor | None"], None]


class Collector(Protocol):
    """Sees every feature once: all that a pass without gradients needs."""

    def collect(self, tap: int, y: Tensor, residual: Tensor | None) -> None:
        """In place: y [n, C, H, W] arrives before the shortcut and the activation that its site leaves to apply, and
        leaves after them."""


class Criterion(Collector, Protocol):
    """Turns features into a loss and per-feature gradients, for one minibatch.

    The pass calls `collect` for every tap of every chunk, then `finish` once, and in backward `scale` once and then
    `gradient` for every tap of every chunk, chunks in order, taps from last to first. If a chunk has to be computed
    again for its backward, `activate` takes the place of `collect`.
    """

    def activate(self, tap: int, y: Tensor, residual: Tensor | None) -> None:
        """The same activation in place, without collecting anything."""

    def finish(self) -> Tensor:
        """The loss, a scalar on the device, once all chunks have been collected."""
        ...

    def scale(self, grad_loss: Tensor) -> None:
        """The gradient with respect to the loss, before the first `gradient`."""

    def gradient(self, tap: int, grad: Tensor, y: Tensor) -> None:
        """In place: grad [n, C, H, W] arrives with respect to y and leaves with respect to the activation's input,
        the criterion's own gradient included."""


class FeaturePass:
    """Runs an extractor over a minibatch in chunks, forward once and backward once per chunk.

    With one chunk the graph of the forward pass is kept for backward. With several, the first pass keeps nothing and
    backward computes each chunk again, so that extractor memory is that of one chunk (DESIGN, identity 3).
    With checkpoints even a chunk's own graph is never whole: the forward pass keeps the inputs of a few stages of
    layers, and backward computes one stage after the other again, from the last to the first.

    Args:
        extractor: any; a copy in `dtype` is made if its own dtype is another.
        dtype: of the extractor's arithmetic, None for the extractor's own.
        chunk_size: images in a chunk, None for the whole minibatch.
        checkpoint: "none", or "stages" to keep the inputs of stages alone.

    Attributes:
        extractor: the given one, or its copy.
        prepared: the extractor as it runs, with sites of its own (see `Extractor.prepared`).
    """

    def __init__(
        self,
        extractor: Extractor,
        *,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        checkpoint: str = "none",
    ):
        if checkpoint not in CHECKPOINTS:
            raise ValueError(f"checkpoint: {checkpoint!r} is not one of {', '.join(CHECKPOINTS)}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size: must be at least 1, got {chunk_size}")
        if chunk_size is not None and extractor.batch_statistics:
            raise ValueError("chunk_size: batch statistics (--extractor-bn batch) need the whole minibatch at once")
        self.dtype = dtype or extractor.dtype
        self.chunk_size = chunk_size
        self.extractor = extractor if self.dtype == extractor.dtype else copy.deepcopy(extractor).to(self.dtype)
        self.prepared = self.extractor.prepared()
        self.stages = self.prepared.stages() if checkpoint == "stages" else None

    def loss(self, images: Tensor, criterion: Criterion) -> Tensor:
        """The criterion's loss of `images` [N, 3, H, W], differentiable with respect to the images."""
        return _MinibatchPass.apply(images, self, criterion, torch.is_grad_enabled() and images.requires_grad)

    def collect(self, images: Tensor, collector: Collector) -> None:
        """The first half alone: `collector.collect` at every tap of every chunk; nothing is kept."""
        with torch.no_grad():
            for chunk in self.chunks(images):
                self.run(chunk, collector.collect)

    def chunks(self, images: Tensor) -> tuple[Tensor, ...]:
        """Views of `images`, `chunk_size` at a time; none of no images."""
        return images.split(self.chunk_size or len(images)) if len(images) else ()

    def run(self, chunk: Tensor, at_tap: AtTap, criterion: Criterion | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run one chunk. Returns the leaf whose gradient is wanted, and one token per tap to start backward from.

        `criterion` is needed for that backward, which is recorded where grad is enabled.
        """
        tokens: list[Tensor] = []
        leaf = self._leaf(chunk).requires_grad_(torch.is_grad_enabled())
        with torch.autocast(leaf.device.type, enabled=False):
            self.prepared(leaf, self._visitor(at_tap, criterion, tokens))
        return leaf, tokens

    def sweep(self, chunk: Tensor, at_tap: AtTap) -> list[list[Tensor]]:
        """Run one chunk stage by stage without a graph. Returns the input of every stage of every network."""
        assert self.stages is not None
        inputs: list[list[Tensor]] = []
        with torch.no_grad(), torch.autocast(chunk.device.type, enabled=False):
            visit, leaf = self._visitor(at_tap, None, []), self._leaf(chunk)
            for stages in self.stages:
                x, kept = leaf, []
                for stage in stages:
                    kept.append(x)
                    x = stage(x, visit)
                inputs.append(kept)
        return inputs

    def gradient_of_sweep(self, inputs: list[list[Tensor]], criterion: Criterion) -> Tensor:
        """∂L/∂chunk from what `sweep` returned, which is used up: every stage is computed again, and then backward."""
        assert self.stages is not None
        gradients: list[Tensor] = []
        for stages, kept in zip(reversed(self.stages), reversed(inputs), strict=True):
            gradient: Tensor | None = None
            for stage in reversed(stages):
                tokens: list[Tensor] = []
                leaf = kept.pop().detach().requires_grad_()
                with torch.enable_grad(), torch.autocast(leaf.device.type, enabled=False):
                    y = stage(leaf, self._visitor(criterion.activate, criterion, tokens))
                gradient = _gradient(leaf, tokens, None if gradient is None else (y, gradient))
                del leaf, y, tokens
            assert gradient is not None
            gradients.append(gradient)
        return gradients[0] if len(gradients) == 1 else torch.stack(gradients).sum(dim=0)

    def keep(self, chunk: Tensor, at_tap: AtTap, criterion: Criterion) -> Any:
        """Run one chunk and return what `gradient` needs: its graph, or with checkpoints the inputs of its stages."""
        if self.stages is not None:
            return self.sweep(chunk, at_tap)
        with torch.enable_grad():
            return self.run(chunk, at_tap, criterion)

    def gradient(self, kept: Any, criterion: Criterion) -> Tensor:
        """∂L/∂chunk from what `keep` returned, which is used up."""
        return _gradient(*kept) if self.stages is None else self.gradient_of_sweep(kept, criterion)

    def _leaf(self, chunk: Tensor) -> Tensor:
        return chunk.detach().to(self.dtype, memory_format=torch.channels_last)

    def _visitor(self, at_tap: AtTap, criterion: Criterion | None, tokens: list[Tensor]) -> Visitor:
        sites = self.prepared.sites

        def visit(index: int, x: Tensor, residual: Tensor | None) -> Tensor:
            if not is_channels_last(x):
                x = x.contiguous(memory_format=torch.channels_last)
            elif not sites[index].owns_input:
                x = x.clone(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            if not torch.is_grad_enabled():
                at_tap(index, x, residual)
                return x
            assert criterion is not None
            y, token = _Tap.apply(x, residual, index, at_tap, criterion, sites[index].owns_gradient)
            tokens.append(token)
            return y

        return visit


class _Tap(torch.autograd.Function):
    """One tap inside a chunk: the activation in place, and in backward the criterion's gradient.

    Returns (y, token). Nothing is computed from the token: it is the criterion's own way out of the graph, so that
    backward can start at every tap, the last one included, without a tensor of zeros.
    """

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, index: int, at_tap, criterion: Criterion, owns_gradient: bool):
        at_tap(index, x, residual)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.index, ctx.criterion, ctx.owns_gradient = index, criterion, owns_gradient
        ctx.has_residual = residual is not None
        return x, x.new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor | None, token: Tensor | None):
        (y,) = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(y)
        elif not ctx.owns_gradient or grad.stride() != y.stride():
            grad = torch.empty_like(y).copy_(grad)
        ctx.criterion.gradient(ctx.index, grad, y)
        return grad, grad if ctx.has_residual else None, None, None, None, None


class _MinibatchPass(torch.autograd.Function):
    """The whole minibatch as one node: forward collects and finishes, backward runs the chunks' own graphs."""

    @staticmethod
    def forward(ctx, images: Tensor, feature_pass: FeaturePass, criterion: Criterion, differentiable: bool):
        ctx.feature_pass, ctx.criterion, ctx.kept = feature_pass, criterion, None
        chunks = feature_pass.chunks(images)
        if not differentiable or len(chunks) > 1:
            feature_pass.collect(images, criterion)
        else:
            ctx.kept = feature_pass.keep(chunks[0], criterion.collect, criterion)
        if differentiable:
            ctx.save_for_backward(images)
        return criterion.finish()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor):
        (images,) = ctx.saved_tensors
        feature_pass, criterion = ctx.feature_pass, ctx.criterion
        criterion.scale(grad_loss)
        if ctx.kept is not None:
            kept, ctx.kept = ctx.kept, ()
            if not kept:
                raise RuntimeError("loss: backward a second time; the pass over the features keeps nothing after one")
            return feature_pass.gradient(kept, criterion).to(images.dtype), None, None, None
        gradient = torch.empty_like(images)
        for chunk, into in zip(feature_pass.chunks(images), feature_pass.chunks(gradient), strict=True):
            kept = feature_pass.keep(chunk, criterion.activate, criterion)
            into.copy_(feature_pass.gradient(kept, criterion))
        return gradient, None, None, None


def _gradient(leaf: Tensor, tokens: list[Tensor], output: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The gradient of the criterion, and of an (output, its gradient) besides, with respect to `leaf`."""
    ends, gradients = [*tokens], [torch.zeros_like(token) for token in tokens]
    if output is not None:
        ends.append(output[0])
        gradients.append(output[1])
    (gradient,) = torch.autograd.grad(ends, leaf, gradients)
    return gradient
