"""From a network to a graph that hands every activation to a visitor.

`tap_network` traces a module with torch.fx, replaces each activation by a call to a visitor, and drops what comes after
the last tap. The result computes `graph(x, visit)` where

    visit(index: int, x: Tensor, residual: Tensor | None) -> Tensor

receives the index of the tap, the value before the activation (and the shortcut that is to be added first, if any) and
returns the activation's output. All values are [N, C, H, W]; a map behind a linear layer, which has its channels last,
is turned for the visit and back. So the passes over the features (plain, fused, chunked) share one graph. Activations
whose derivative is no function of their output (SiLU, GELU) stay in the graph, and the visitor gets their output.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from engine.representation.tracing.folding import drop_identities, freeze
from engine.support.errors import one_line

Visitor = Callable[[int, Tensor, "Tensor | None"], Tensor]


class Mark(nn.Module):
    """Returns its input: a place where a network that has no activation there is tapped."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x


# "none": the activation stays in the graph, and the tap is what it returns.
_ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "none", nn.GELU: "none", Mark: "none"}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "none",
    F.gelu: "none",
}
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}
_OUT_OF_PLACE: dict[Any, Any] = {
    F.relu_: F.relu,
    torch.relu_: F.relu,
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    "relu_": "relu",
    "add_": "add",
    "mul_": "mul",
}
ADDITIONS = (operator.add, torch.add)
_FRESH_MODULES = (nn.Conv2d, nn.BatchNorm2d)


@dataclass(frozen=True)
class TapSite:
    """One activation of a traced network.

    Attributes:
        name: of the network and of the module (for functions: the module that calls it, and the function's name).
        activation: what turns the visitor's input into the tap: "relu", "relu6", or "none" (done already).
        index: position among all taps of the extractor, in forward order.
        owns_input: nothing else reads the site's input, so the activation may happen in place.
        bias: [C], to be added first; None if there is none.
        applied: the activation has happened already when the visitor is called; its mask in backward has not.
    """

    name: str
    activation: str
    index: int
    owns_input: bool
    bias: Tensor | None = None
    applied: bool = False

    @property
    def to_apply(self) -> str:
        """The activation that is left to the visitor."""
        return "none" if self.applied else self.activation


def mask_(grad: Tensor, y: Tensor, activation: str) -> None:
    """In place, `grad ← grad · activation'(y)`: y > 0 for "relu", 0 < y < 6 for "relu6", 1 for "none"."""
    # One pass each; on a CPU, masked_fill_ takes ten times as long.
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)
    elif activation == "relu6":
        torch.ops.aten.hardtanh_backward.grad_input(grad, y, 0, 6, grad_input=grad)


@dataclass(frozen=True)
class Leaves:
    """Module types, and functions by identity, that torch.fx treats as leaves."""

    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable, ...] = ()


class NoMatch(ValueError):
    """Raised where a pattern matches no activation."""


class WrongSize(ValueError):
    """Raised where a network cannot be run on the example."""


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor in its node's `meta["shape"]`; torch's own pass prints tracebacks."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["shape"] = value.shape
        return value


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Leaves):
        super().__init__(autowrap_functions=tuple(f for f in leaves.functions if isinstance(f, FunctionType)))
        self.leaves = (*leaves.modules, Mark)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, self.leaves) or super().is_leaf_module(module, qualified_name)


def tap_network(
    network: nn.Module,
    *,
    prefix: str,
    first_index: int = 0,
    pattern: str | None = None,
    layers: int | None = None,
    layers_from: str = "bottom",
    example: Tensor | None = None,
    fold: bool = True,
    leaves: Leaves | None = None,
) -> tuple[fx.GraphModule, list[TapSite]]:
    """Trace `network`, in evaluation mode, tap its activations, and drop everything after the last tap.

    Args:
        prefix: goes before every tap's name.
        first_index: index of the first tap.
        pattern: tap only activations whose name matches this glob, or one of several separated by commas, with or
            without the prefix.
        layers: of those tap only this many (all if None or more than there are) ...
        layers_from: ... counted from the "bottom" (the images) or the "top".
        example: images that the network is run on once, to leave out activations that are no feature maps [N, C, H, W].
        fold: also `freeze` the graph, in the network's dtype.
        leaves: modules and functions that torch.fx treats as leaves.

    Raises ValueError if there is nothing to tap, or if the network cannot be traced; NoMatch if it is the pattern,
    WrongSize if it is the example.
    """
    try:
        traced = fx.GraphModule(network, _Tracer(leaves or Leaves()).trace(network))
    except Exception as error:  # whatever the network's own code does with a symbolic value
        raise ValueError(f"{prefix}: torch.fx cannot trace this network ({one_line(error)})") from error
    drop_identities(traced)
    modules = dict(traced.named_modules())
    _make_out_of_place(traced.graph, modules)
    if example is not None:
        try:
            with torch.no_grad():
                _Shapes(traced).run(example)
        except Exception as error:  # a network's own way to say that a size is wrong
            raise WrongSize(f"{prefix}: cannot take images {list(example.shape)} ({one_line(error)})") from error
    count = None if example is None else len(example)
    found = [node for node in traced.graph.nodes if _activation_of(node, modules) and _may_be_feature_map(node, count)]
    if not found:
        raise ValueError(f"{prefix}: the network has no feature maps behind ReLU, ReLU6, SiLU or GELU to tap")
    names = _names(found, prefix)
    taps = [node for node in found if pattern is None or _matches(names[node], prefix, pattern)]
    if not taps:
        known = list(names.values())
        listed = ", ".join(known[:4]) + (f", … {known[-1]}" if len(known) > 4 else "")
        raise NoMatch(f"no tap of {prefix} matches {pattern!r}; its taps are {listed}")
    if layers is not None:
        taps = taps[:layers] if layers_from == "bottom" else taps[-layers:]
    activations = [(names[node], str(_activation_of(node, modules))) for node in taps]
    visits = _insert_visits(traced.graph, taps, modules, first_index)
    traced.delete_all_unused_submodules()
    graph_module = fx.GraphModule(traced, traced.graph, f"{type(network).__name__}Taps")
    sites = [
        _site(visit, name, activation, modules) for visit, (name, activation) in zip(visits, activations, strict=True)
    ]
    return freeze(graph_module, dtype=next(network.parameters()).dtype) if fold else graph_module, sites


def is_visit(node: fx.Node) -> bool:
    """Whether the node of a tapped graph calls the visitor: `_visit(visit, index, x, residual)`."""
    return node.op == "call_function" and node.target is _visit


def is_visitor(node: fx.Node) -> bool:
    """Whether the node of a tapped graph is its input `visit`."""
    return node.op == "placeholder" and node.target == "visit"


def _visit(visit: Visitor, index: int, x: Tensor, residual: Tensor | None) -> Tensor:
    return visit(index, x, residual)


def _activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_module":
        return _ACTIVATION_MODULES.get(type(modules[str(node.target)]))
    if node.op == "call_function":
        return _ACTIVATION_FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return _ACTIVATION_METHODS.get(str(node.target))
    return None


def _calls(node: fx.Node, kinds: tuple[type, ...], modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], kinds)


def _may_be_feature_map(node: fx.Node, count: int | None) -> bool:
    """Whether the node's value is [N, C, H, W], of N = `count` images, or unknown because there was no example.

    Another N has what is made of weights alone, such as Swin V2's table of biases.
    """
    seen = node.meta.get("shape")
    return seen is None or (len(seen) == 4 and seen[0] == count)


def _channels_come_last(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it is known that the activation's map is [N, H, W, C]: behind a linear layer, as in ConvNeXt and Swin."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return "shape" in node.meta and (_calls(source, (nn.Linear,), modules) or source.target is F.linear)


def _make_out_of_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Let operations that change their input in place return a new value, and later readers of the input read that.

    A tap keeps its output for backward, so nothing else may write to it.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    writing = {name for name, module in modules.items() if getattr(module, "inplace", False) is True}
    for name in writing:
        modules[name].inplace = False  # type: ignore[assignment]
    for node in graph.nodes:
        if node.op == "call_module":
            in_place = node.target in writing
        else:
            in_place = node.kwargs.get("inplace") is True or node.target in _OUT_OF_PLACE
            node.target = _OUT_OF_PLACE.get(node.target, node.target)
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        if in_place:
            source = node.args[0]
            for reader in list(source.users):
                if order[reader] > order[node]:
                    reader.replace_input_with(source, node)


def _names(nodes: Sequence[fx.Node], prefix: str) -> dict[fx.Node, str]:
    """`prefix.module` for modules, `prefix.caller.function` for functions; `_1`, `_2`, … for further calls."""
    names: dict[fx.Node, str] = {}
    calls: Counter[str] = Counter()
    for node in nodes:
        if node.op == "call_module":
            parts = [prefix, str(node.target)]
        else:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            function = node.target if isinstance(node.target, str) else node.target.__name__
            parts = [prefix, *([stack[-1][0]] if stack else []), function]
        name = ".".join(parts)
        names[node] = f"{name}_{calls[name]}" if calls[name] else name
        calls[name] += 1
    return names


def _matches(name: str, prefix: str, pattern: str) -> bool:
    short = name.removeprefix(f"{prefix}.")
    return any(fnmatchcase(candidate, part.strip()) for part in pattern.split(",") for candidate in (name, short))


def _insert_visits(
    graph: fx.Graph, taps: Sequence[fx.Node], modules: dict[str, nn.Module], first_index: int
) -> list[fx.Node]:
    """Call the visitor at every tap, return the last tap's output, and drop every node that nothing reads."""
    images = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        visit = graph.placeholder("visit")
    visits = []
    for index, node in enumerate(taps, first_index):
        activation_stays = _activation_of(node, modules) == "none"
        x, residual = (node, None) if activation_stays else _split_residual(node, modules)
        channels_come_last = _channels_come_last(node, modules)
        readers = list(node.users)
        with graph.inserting_before(node.next):
            if channels_come_last:
                x = graph.call_method("permute", (x, 0, 3, 1, 2))
            visited = graph.call_function(_visit, (visit, index, x, residual))
            after = graph.call_method("permute", (visited, 0, 2, 3, 1)) if channels_come_last else visited
        for reader in readers:
            reader.replace_input_with(node, after)
        if not activation_stays:
            graph.erase_node(node)
        visits.append(visited)
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (visits[-1],)
    for node in list(graph.nodes):  # other inputs than the images, at their defaults
        if node.op == "placeholder" and node not in (images, visit) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.target is _visit or node.op in ("placeholder", "output"))
    graph.lint()
    return visits


def _split_residual(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, fx.Node | None]:
    """The activation's input as (x, residual), with a residual if it is a sum made for this activation alone."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.op == "call_function" and source.target in ADDITIONS and len(source.users) == 1:
        terms = [term for term in source.args if isinstance(term, fx.Node)]
        if len(terms) == len(source.args) == 2 and not source.kwargs:
            for x, residual in (terms, terms[::-1]):
                if _calls(x, _FRESH_MODULES, modules) and len(x.users) == 1 and x is not residual:
                    return x, residual
    return source, None


def _site(visit: fx.Node, name: str, activation: str, modules: dict[str, nn.Module]) -> TapSite:
    _, index, x, _ = visit.args
    assert isinstance(index, int)
    assert isinstance(x, fx.Node)
    fresh = _calls(x, _FRESH_MODULES, modules) or x.target in ADDITIONS or activation == "none"
    return TapSite(
        name=name,
        activation=activation,
        index=index,
        owns_input=fresh and len(x.users) == 1,
    )
