"""The pass over the features: chunks, precision, memory, masks. It knows no loss.

What to do with the features is a criterion's business (`engine.representation.protocols`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

import kernels as kernel_backends
from engine.representation.branches import Branches
from engine.representation.extractor import Extractor, Normalised
from engine.representation.protocols import Affine, Collector, Criterion, PerImage, Ranks, TapInput
from engine.representation.tracing.tap import mask_
from engine.representation.tracing.tape import Tape, Taps
from engine.support.errors import InputError
from engine.training.ranks import ALONE

RECOMPUTE = ("none", "stages")


class Activate:
    """The collector that computes the features and does nothing with them, as in a second forward pass."""

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        x.activate_()


_ACTIVATE = Activate()


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

    With one chunk the forward pass records what backward needs. With several, the first pass keeps nothing and backward
    computes each chunk again, so that extractor memory is that of one chunk (docs/method.md, identity 3). With
    `recompute="stages"` even a chunk's own record is never whole: the forward pass keeps the inputs of a few stages of
    layers, and backward computes one stage after the other again, from the last to the first.

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
        tapes: of its networks, stage by stage.
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
        parts = self.prepared.stages() if recompute == "stages" else [[network] for network in self.prepared.networks]
        self.tapes = [[_tape(part, self.prepared) for part in network] for network in parts]
        self.recompute, self.branches = recompute, Branches(extractor.device)
        self.kernels = chosen_backend(kernels, extractor.device, self.dtype)

    def loss(self, images: Tensor, criterion: Criterion, ranks: Ranks = ALONE) -> Tensor:
        """The criterion's loss of `images` [N, 3, H, W], differentiable with respect to the images."""
        differentiable = torch.is_grad_enabled() and images.requires_grad
        return _MinibatchPass.apply(images, self, criterion, ranks, differentiable)

    def collect(self, images: Tensor, collector: Collector) -> None:
        """The first half alone: `collector.collect` at every tap of every chunk; nothing is kept."""
        for part in self.chunks(len(images)):
            self._run(images[part], Chunk(part, collector), keep=False)

    def chunks(self, count: int) -> Iterator[slice]:
        """Slices of a minibatch of `count` images, `chunk_size` at a time."""
        size = self.chunk_size or max(count, 1)
        starts = range(0, count, size)
        return (slice(start, min(start + size, count)) for start in starts[: self.max_chunks])

    def keep(self, images: Tensor, chunk: Chunk) -> list[Any]:
        """Run one chunk and return what `gradient` needs of every network: its record, or the inputs of its stages."""
        return self._run(images, chunk, keep=True)

    def gradient(self, kept: list[Any], chunk: Chunk) -> Tensor:
        """∂L/∂chunk from what `keep` returned, which is used up; `chunk.gradient` must be known."""
        whole = self.recompute == "none"
        if not whole:
            chunk.collector = _ACTIVATE
        taps, go_back = _Taps(self, chunk), _gradient_of_record if whole else _gradient_of_stages
        back = [functools.partial(go_back, tapes, own, taps) for tapes, own in zip(self.tapes, kept, strict=True)]
        kept.clear()
        with self._frozen():
            found = reversed(self.branches.run(back, last_first=True))
            return functools.reduce(Tensor.add, (gradient for gradient in found if gradient is not None))

    def _run(self, images: Tensor, chunk: Chunk, *, keep: bool) -> list[Any]:
        taps, leaf = _Taps(self, chunk), images.detach().to(self.dtype, memory_format=torch.channels_last)
        go = _run if not keep else _record if self.recompute == "none" else _inputs_of_stages
        with self._frozen():
            return self.branches.run([functools.partial(go, tapes, leaf, taps) for tapes in self.tapes])

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """Neither autograd nor autocast: tapes know what backward needs, and the dtype is the extractor's."""
        with torch.no_grad(), torch.autocast(self.extractor.device.type, enabled=False):
            yield


def _run(tapes: list[Tape], images: Tensor, taps: Taps) -> None:
    for tape in tapes:
        images = tape.run(images, taps)


def _record(tapes: list[Tape], images: Tensor, taps: Taps) -> list[Any]:
    (tape,) = tapes
    return tape.record(images, taps)[1]


def _gradient_of_record(tapes: list[Tape], kept: list[Any], taps: Taps) -> Tensor | None:
    (tape,) = tapes
    return tape.gradient(kept, taps)


def _inputs_of_stages(tapes: list[Tape], images: Tensor, taps: Taps) -> list[Tensor]:
    inputs = []
    for tape in tapes:
        inputs.append(images)
        images = tape.run(images, taps)
    return inputs


def _gradient_of_stages(tapes: list[Tape], inputs: list[Tensor], taps: Taps) -> Tensor | None:
    """Every stage is computed again, and then backward, from the last to the first; `inputs` are used up."""
    gradient: Tensor | None = None
    for tape in reversed(tapes):
        _, kept = tape.record(inputs.pop(), taps)
        gradient = tape.gradient(kept, taps, gradient)
    return gradient


class _Taps:
    """What a chunk's collector sees of the taps, and what its criterion sends back."""

    def __init__(self, feature_pass: FeaturePass, chunk: Chunk):
        self.sites, self.kernels, self.chunk = feature_pass.prepared.sites, feature_pass.kernels, chunk

    def collect(self, index: int, x: Tensor, residual: Tensor | None) -> None:
        """See `engine.representation.tracing.tape.Taps`."""
        site = self.sites[index]
        self.chunk.collector.collect(index, TapInput(x, residual, site.to_apply, site.bias), self.chunk.images)

    def gradient(self, index: int, y: Tensor, arriving: Tensor, shortcut: Tensor | None) -> None:
        """See `engine.representation.tracing.tape.Taps`."""
        own, activation = self.chunk.gradient(index), self.sites[index].activation
        if isinstance(own, Affine):
            self.kernels.relu_moments_backward(arriving, y, own.a, own.b, activation, shortcut)
            return
        if shortcut is not None:
            arriving.add_(shortcut)
        # The sums in the wider dtype of the two, stored in the features' own.
        arriving.add_(own.g if own.slope is None else torch.addcmul(own.g, own.slope, y))
        mask_(arriving, y, activation)


def _tape(part: nn.Module, extractor: Extractor) -> Tape:
    """Of a network or one of its stages, with the normalisation in front if that is the first thing in it."""
    normalisation, graph = (part.normalisation, part.network) if isinstance(part, Normalised) else (None, part)
    assert isinstance(graph, fx.GraphModule)
    return Tape(graph, extractor.sites, normalisation)


def check_whole(extractor: Extractor, ranks: Ranks) -> None:
    """InputError on `ranks` if minibatches are shared, but the extractor's batch statistics are of whole ones."""
    if extractor.batch_statistics and ranks.size > 1:
        raise InputError("ranks", 'batch statistics (bn="batch") need the whole minibatch in one process')


def chosen_backend(kernels: str | ModuleType, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend of that name, or which is given; InputError if it cannot run here (see `kernels.select`)."""
    if not isinstance(kernels, str):
        return kernels
    try:
        return kernel_backends.select(kernels, device, dtype)
    except ValueError as error:
        raise InputError("kernels", str(error).removeprefix("kernels: ")) from None


class _MinibatchPass(torch.autograd.Function):
    """The whole minibatch as one node: forward collects and finishes, backward runs the chunks' own graphs."""

    @staticmethod
    def forward(ctx, images: Tensor, feature_pass: FeaturePass, criterion: Criterion, ranks: Ranks, keep: bool):
        ctx.feature_pass, ctx.criterion, ctx.kept = feature_pass, criterion, None
        parts = list(feature_pass.chunks(len(images)))
        if not keep or len(parts) != 1:
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
        if not self.affine:
            last = self.criterion.gradient(self.taps - 1, images)  # which is asked for first
            if isinstance(last, PerImage):
                return functools.partial(self._per_image, images, [last])
            # The same for all chunks, and two values for each feature: all taps at once, in one operation.
            found = [*(self.criterion.gradient(tap, images) for tap in range(self.taps - 1)), last]
            pairs = [pair for pair in found if isinstance(pair, Affine)]
            scaled = iter(torch._foreach_mul([part for pair in pairs for part in (pair.a, pair.b)], self.grad_loss))
            self.affine = [Affine(next(scaled), next(scaled)) for _ in pairs]
        return self.affine.__getitem__

    def _per_image(self, images: slice, last: list[PerImage], tap: int) -> PerImage:
        own = last.pop() if last and tap == self.taps - 1 else self.criterion.gradient(tap, images)
        assert isinstance(own, PerImage)
        return PerImage(own.g * self.grad_loss, None if own.slope is None else own.slope * self.grad_loss)
