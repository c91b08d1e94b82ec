"""From a trained network to a frozen graph that hands every activation to a visitor.

`tap_network` traces a module with torch.fx, folds BatchNorm into the convolutions, replaces each activation by a
call to a visitor, and drops what comes after the last tap. The result computes `graph(x, visit)` where

    visit(index: int, x: Tensor, residual: Tensor | None) -> Tensor

receives the index of the tap, the convolution's output before the activation (and the shortcut that is to be added first, if any) and
returns the activation's output. So the passes over the features (plain, fused, chunked) share one graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

Visitor = Callable[[int, Tensor, "Tensor | None"], Tensor]

_ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_ACTIVATION_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6"}
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_FRESH_MODULES = (nn.Conv2d, nn.BatchNorm2d)
_OWN_GRADIENT_MODULES = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class TapSite:
    """One activation of a traced network.

    Attributes:
        name: qualified name of the module or fx node.
        activation: "relu" or "relu6".
        index: position among all taps of the extractor, in forward order.
        owns_input: nothing else reads the site's input, so the activation may happen in place.
        owns_gradient: the gradient that arrives in backward is referenced by nobody else, so it may be overwritten.
    """

    name: str
    activation: str
    index: int
    owns_input: bool
    owns_gradient: bool


def _visit(visit: Visitor, index: int, x: Tensor, residual: Tensor | None) -> Tensor:
    return visit(index, x, residual)


def _activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_module":
        return _ACTIVATION_MODULES.get(type(modules[str(node.target)]))
    if node.op == "call_function":
        return _ACTIVATION_FUNCTIONS.get(node.target)  # type: ignore[call-overload]
    if node.op == "call_method":
        return _ACTIVATION_METHODS.get(str(node.target))
    return None


def _calls(node: fx.Node, kinds: tuple[type, ...], modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], kinds)


def fold_batchnorm(graph_module: fx.GraphModule) -> None:
    """Replace every convolution followed by BatchNorm alone with the one convolution that they equal in evaluation:

    w' = w · γ/√(running_var + ε)        b' = (b − running_mean) · γ/√(running_var + ε) + β
    """
    modules = dict(graph_module.named_modules())
    for node in list(graph_module.graph.nodes):
        if not _calls(node, (nn.BatchNorm2d,), modules):
            continue
        source = node.args[0]
        if not _calls(source, (nn.Conv2d,), modules) or len(source.users) != 1:
            continue
        conv, bn = modules[str(source.target)], modules[str(node.target)]
        assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
        assert bn.running_mean is not None and bn.running_var is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        node.replace_all_uses_with(source)
        graph_module.graph.erase_node(node)


def _split_residual(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, fx.Node | None]:
    """The activation's input as (x, residual), with a residual if it is a sum made for this activation alone."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.op == "call_function" and source.target in _ADDITIONS and len(source.users) == 1:
        terms = source.args
        if len(terms) == 2 and all(isinstance(term, fx.Node) for term in terms) and not source.kwargs:
            first, second = terms
            for x, residual in ((first, second), (second, first)):
                if _calls(x, _FRESH_MODULES, modules) and len(x.users) == 1 and x is not residual:
                    return x, residual
    return source, None


def tap_network(
    network: nn.Module,
    *,
    prefix: str,
    first_index: int = 0,
    layers: int | None = None,
    layers_from: str = "bottom",
    fold: bool = True,
) -> tuple[fx.GraphModule, list[TapSite]]:
    """Trace `network`, tap its activations, and drop everything after the last tap; see the module's docstring.

    Args:
        prefix: goes before every tap's name.
        first_index: index of the first tap.
        layers: tap only this many activations (all if None or more than there are) ...
        layers_from: ... counted from the "bottom" (the images) or the "top".
        fold: fold BatchNorm into the convolutions (off for BatchNorm with batch statistics).

    Raises ValueError if there is nothing to tap.
    """
    traced = fx.symbolic_trace(network)
    if fold:
        fold_batchnorm(traced)
    graph = traced.graph
    modules = dict(traced.named_modules())
    for node in list(graph.nodes):
        if _calls(node, (nn.Dropout, nn.Identity), modules):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    activations = [node for node in graph.nodes if _activation_of(node, modules) is not None]
    if layers is not None:
        activations = activations[:layers] if layers_from == "bottom" else activations[-layers:]
    if not activations:
        raise ValueError(f"{prefix}: the network has no ReLU or ReLU6 to tap")

    images = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        visit = graph.placeholder("visit")
    visits: list[tuple[fx.Node, str, str]] = []
    for node in activations:
        x, residual = _split_residual(node, modules)
        with graph.inserting_before(node):
            visited = graph.call_function(_visit, (visit, first_index + len(visits), x, residual))
        node.replace_all_uses_with(visited)
        visits.append((visited, node.name, str(_activation_of(node, modules))))
        graph.erase_node(node)
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (visits[-1][0],)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.target is _visit or node.is_impure())
    graph.lint()
    traced.delete_all_unused_submodules()

    sites = []
    for node, name, activation in visits:
        x = node.args[2]
        assert isinstance(x, fx.Node)
        fresh = _calls(x, _FRESH_MODULES, modules) or (x.op == "call_function" and x.target in _ADDITIONS)
        readers = [user for user in node.users if user.op != "output"]
        sites.append(
            TapSite(
                name=f"{prefix}.{name}",
                activation=activation,
                index=int(node.args[1]),  # type: ignore[arg-type]
                owns_input=fresh and len(x.users) == 1,
                owns_gradient=len(readers) != 1 or _calls(readers[0], _OWN_GRADIENT_MODULES, modules),
            )
        )
    return fx.GraphModule(traced, graph, f"{type(network).__name__}Taps"), sites
