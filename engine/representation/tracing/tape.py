"""A frozen network without autograd: the calls of its forward pass and of its backward pass, listed once.

A `Tape` is made from a tapped graph. `run` and `record` go through its calls in order, `gradient` goes back through
them. Convolutions, poolings, additions and taps say themselves what they keep and what their gradient is; whatever
else a network does (attention, concatenations, untapped activations) goes through autograd, one call at a time.

Autograd would make a node for every call of every step, give every tap a root of its own, and ask at each step again
what the graph has said once: who reads what, what may be written over, what can be freed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from engine.representation.tracing.convolutions import FrozenConv2d
from engine.representation.tracing.tap import ADDITIONS, TapSite, is_visit, is_visitor
from kernels.layout import is_channels_last


class Taps(Protocol):
    """Who sees the taps of a pass."""

    def collect(self, index: int, x: Tensor, residual: Tensor | None) -> None:
        """Leave the tap's output y in `x` [n, C, H, W], which is channels_last, as `residual` is if there is one."""
        ...

    def gradient(self, index: int, y: Tensor, arriving: Tensor, shortcut: Tensor | None) -> None:
        """In place, `arriving` ← ∂L/∂(the tap's input), from the sum of `arriving` and `shortcut`, which came from
        later layers; both lie in memory as y does."""
        ...


class Arriving:
    """The gradients that have come back to one value so far: their sum, with at most one addition left to do.

    Attributes:
        own: a tensor that nobody else will read, so it may be changed.
        shared: one that is only read.
    """

    __slots__ = ("own", "shared")

    def __init__(self) -> None:
        self.own: Tensor | None = None
        self.shared: Tensor | None = None

    def add(self, gradient: Tensor, *, owned: bool) -> None:
        """One more, in the order in which autograd would add them."""
        if self.own is not None and self.shared is not None:
            self.own.add_(self.shared)
            self.shared = None
        if owned and self.own is None:
            self.own = gradient
        elif self.shared is None:
            self.shared = gradient
        else:
            self.own, self.shared = self.shared + gradient, None

    def total(self) -> Tensor | None:
        """The sum, only to be read; None if nothing came."""
        if self.own is None:
            return self.shared
        return self.own if self.shared is None else self.own.add_(self.shared)

    def gradient(self) -> Tensor:
        """The sum, only to be read, where something came."""
        total = self.total()
        assert total is not None
        return total

    def for_tap(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sum as two terms that lie in memory as the tap's output y, the first to be written over."""
        own, shared = self.own, self.shared
        if own is None:
            own, shared = torch.zeros_like(y) if shared is None else torch.empty_like(y).copy_(shared), None
        elif not is_channels_last(own):
            own = torch.empty_like(y).copy_(own)
        if shared is not None and not is_channels_last(shared):
            own, shared = own.add_(shared), None
        return own, shared


Gradients = Sequence[Sequence["Tensor | None"]]
"""For every input of a call: the gradients of the tensors in it, of which there is one but for tuples."""


class Call(Protocol):
    """One operation of the network, on values that come and go.

    Attributes:
        owned: nobody else reads the gradients that `backward` returns.
    """

    owned: bool

    def forward(self, values: Sequence[Any], taps: Taps, keep: bool) -> tuple[Any, Any]:
        """The result for the inputs `values`, and what `backward` needs if `keep`."""
        ...

    def backward(self, kept: Any, arriving: Sequence[Arriving], taps: Taps) -> Gradients:
        """The inputs' gradients, from those of the tensors in the result."""
        ...


class _Visit:
    """A tap: the activation in place, and in backward the criterion's gradient and the mask."""

    def __init__(self, site: TapSite, inputs: int):
        self.site, self.inputs, self.owned = site, inputs, inputs == 1

    def forward(self, values: Sequence[Any], taps: Taps, keep: bool) -> tuple[Tensor, Any]:
        x, residual = values if self.inputs == 2 else (values[0], None)
        if not is_channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        elif not self.site.owns_input:
            x = x.clone(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        taps.collect(self.site.index, x, residual)
        return x, (x, None if residual is None else residual.shape) if keep else None

    def backward(self, kept: Any, arriving: Sequence[Arriving], taps: Taps) -> Gradients:
        y, residual = kept
        gradient, shortcut = (arriving[0] if arriving else Arriving()).for_tap(y)
        taps.gradient(self.site.index, y, gradient, shortcut)
        return [[gradient]] if residual is None else [[gradient], [gradient.sum_to_size(residual)]]


class _Convolution:
    """A frozen convolution. Of its input it needs the shape; where the input is kept anyway, that will do."""

    owned = True

    def __init__(self, module: FrozenConv2d, input_is_kept: bool):
        self.module, self.input_is_kept = module, input_is_kept

    def forward(self, values: Sequence[Any], taps: Taps, keep: bool) -> tuple[Tensor, Any]:
        (x,) = values
        return self.module.run(x), x if keep and self.input_is_kept else x.shape

    def backward(self, kept: Any, arriving: Sequence[Arriving], taps: Taps) -> Gradients:
        return [[self.module.input_gradient(arriving[0].gradient(), kept)]]


class _MaxPool:
    owned = True

    def __init__(self, module: nn.MaxPool2d):
        self.module = module
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        self.geometry = (*([n, n] if isinstance(n, int) else list(n) for n in sizes), module.ceil_mode)

    def forward(self, values: Sequence[Any], taps: Taps, keep: bool) -> tuple[Tensor, Any]:
        (x,) = values
        if not keep:
            return self.module(x), None
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *self.geometry)
        return y, (x, indices)

    def backward(self, kept: Any, arriving: Sequence[Arriving], taps: Taps) -> Gradients:
        x, indices = kept
        gradient = arriving[0].gradient()
        return [[torch.ops.aten.max_pool2d_with_indices_backward(gradient, x, *self.geometry, indices)]]


class _Normalise:
    """The images as a network was trained on them: x · scale + shift, channel by channel."""

    owned = True

    def __init__(self, normalisation: Callable[[Tensor], Tensor], scale: Tensor):
        self.normalisation, self.scale = normalisation, scale

    def forward(self, values: Sequence[Any], taps: Taps, keep: bool) -> tuple[Tensor, Any]:
        return self.normalisation(values[0]), None

    def backward(self, kept: Any, arriving: Sequence[Arriving], taps: Taps) -> Gradients:
        return [[arriving[0].gradient() * self.scale]]


class _Add:
    """a + b, of numbers and tensors, which may broadcast."""

    owned = False

    def forward(self, values: Sequence[Any], taps: Taps, keep: bool) -> tuple[Any, Any]:
        return values[0] + values[1], [value.shape if isinstance(value, Tensor) else None for value in values]

    def backward(self, kept: Any, arriving: Sequence[Arriving], taps: Taps) -> Gradients:
        gradient = arriving[0].gradient()
        return [[] if shape is None else [gradient.sum_to_size(shape)] for shape in kept]


class _Anything:
    """Any other node of a graph: autograd of it alone."""

    owned = False

    def __init__(self, graph: fx.GraphModule, node: fx.Node):
        self.graph, self.node, self.inputs = graph, node, node.all_input_nodes

    def _run(self, values: Sequence[Any]) -> Any:
        node, known = self.node, dict(zip(self.inputs, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "call_module":
            return self.graph.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.graph)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def forward(self, values: Sequence[Any], taps: Taps, keep: bool) -> tuple[Any, Any]:
        if not keep:
            return self._run(values), None
        given = tree_map(_leaf, list(values))
        with torch.enable_grad():
            result = self._run(given)
        detached = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, result)
        return detached, ([_tensors(value) for value in given], _tensors(result))

    def backward(self, kept: Any, arriving: Sequence[Arriving], taps: Taps) -> Gradients:
        given, results = kept
        totals = [gradients.total() for gradients in arriving]
        ends = [
            (result, total)
            for result, total in zip(results, totals, strict=True)
            if total is not None and result.requires_grad
        ]
        wanted = [tensor for tensors in given for tensor in tensors if tensor.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if ends and wanted:
            outputs, gradients = zip(*ends, strict=True)
            found = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
        of = dict(zip(map(id, wanted), found, strict=True))
        return [[of.get(id(tensor)) for tensor in tensors] for tensors in given]


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.is_floating_point())


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Tape:
    """One network, or one stage of it, as a list of calls.

    Args:
        graph: a tapped graph of `engine.representation.tracing`; its weights are shared.
        sites: of all taps of the extractor.
        normalisation: what happens to the images first, with its `scale`; None if nothing does.
    """

    def __init__(self, graph: fx.GraphModule, sites: Sequence[TapSite], normalisation: nn.Module | None = None):
        nodes = [node for node in graph.graph.nodes if node.op != "output" and not is_visitor(node)]
        images = next(node for node in nodes if node.op == "placeholder")
        make = functools.partial(_call, graph, sites)
        # Each call with the places of its inputs and of its result among the values.
        place = {images: 0}
        self.calls: list[tuple[Call, tuple[int, ...], int]] = []
        if normalisation is not None:
            place[images] = 1
            assert isinstance(normalisation.scale, Tensor)
            self.calls.append((_Normalise(normalisation, normalisation.scale), (0,), 1))
        for node in nodes:
            if node is not images:
                inputs = tuple(place[source] for source in node.all_input_nodes if not is_visitor(source))
                place[node] = len(place) + (normalisation is not None)
                self.calls.append((make(node), inputs, place[node]))
        (result,) = next(node for node in graph.graph.nodes if node.op == "output").args
        assert isinstance(result, fx.Node)
        self.last = place[result]
        last_reader = {source: n for n, (_, inputs, _) in enumerate(self.calls) for source in inputs}
        # Places whose value nobody needs after a call.
        self.done = [
            tuple(p for p in {*inputs, result} if last_reader.get(p, n) == n and p != self.last)
            for n, (_, inputs, result) in enumerate(self.calls)
        ]

    def run(self, images: Tensor, taps: Taps) -> Tensor:
        """The last tap's output for `images` [n, 3, H, W], or for a later stage's input, which is only read."""
        return self._forward(images, taps, None)

    def record(self, images: Tensor, taps: Taps) -> tuple[Tensor, list[Any]]:
        """The same, and what `gradient` needs."""
        kept: list[Any] = []
        return self._forward(images, taps, kept), kept

    def _forward(self, images: Tensor, taps: Taps, kept: list[Any] | None) -> Tensor:
        values: list[Any] = [images, *[None] * len(self.calls)]
        for (call, inputs, result), done in zip(self.calls, self.done, strict=True):
            values[result], own = call.forward([values[place] for place in inputs], taps, kept is not None)
            if kept is not None:
                kept.append(own)
            del own
            for place in done:
                values[place] = None
        last: Tensor = values[self.last]
        return last

    def gradient(self, kept: list[Any], taps: Taps, gradient: Tensor | None = None) -> Tensor | None:
        """∂L/∂images from what `record` kept, which is used up; None if no gradient reaches the images.

        Args:
            gradient: that of the result if more than the taps depends on it; it is written over.
        """
        arriving: list[list[Arriving]] = [[] for _ in range(len(self.calls) + 1)]
        if gradient is not None:
            arriving[self.last] = [Arriving()]
            arriving[self.last][0].add(gradient, owned=True)
            del gradient
        for call, inputs, result in reversed(self.calls):
            own, came, arriving[result] = kept.pop(), arriving[result], []
            if came or isinstance(call, _Visit):
                for place, gradients in zip(inputs, call.backward(own, came, taps), strict=True):
                    _deliver(gradients, arriving[place], owned=call.owned)
            del own, came
        return arriving[0][0].total() if arriving[0] else None


def _deliver(gradients: Sequence[Tensor | None], arriving: list[Arriving], *, owned: bool) -> None:
    if all(gradient is None for gradient in gradients):
        return
    if not arriving:
        arriving.extend(Arriving() for _ in gradients)
    for gradient, sum_so_far in zip(gradients, arriving, strict=True):
        if gradient is not None:
            sum_so_far.add(gradient, owned=owned)


def _call(graph: fx.GraphModule, sites: Sequence[TapSite], node: fx.Node) -> Call:
    sources = [source for source in node.all_input_nodes if not is_visitor(source)]
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if is_visit(node):
        index = node.args[1]
        assert isinstance(index, int)
        return _Visit(sites[index], len(sources))
    if isinstance(module, FrozenConv2d):
        return _Convolution(module, input_is_kept=is_visit(sources[0]))
    if type(module) is nn.MaxPool2d and not module.return_indices:
        return _MaxPool(module)
    if node.op == "call_function" and node.target in ADDITIONS and len(sources) == len(node.args) == 2:
        return _Add() if not node.kwargs else _Anything(graph, node)
    return _Anything(graph, node)
