"""Fold BatchNorm into convolutions and drop no-ops in a frozen network."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def freeze(graph_module: fx.GraphModule, *, fold: bool = True, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """Freeze a traced network in place, in evaluation mode, and return it.

    BatchNorm is folded into the convolution before it (leave out `fold` for batch statistics), modules that do nothing
    are dropped, and no parameter requires a gradient. The weights end channels_last and in `dtype`; the folding is done
    in float64, so that they are correctly rounded.
    """
    graph_module.eval().requires_grad_(False).double()
    drop_identities(graph_module)
    if fold:
        fold_batchnorm(graph_module)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module.to(dtype).to(memory_format=torch.channels_last)


def drop_identities(graph_module: fx.GraphModule) -> None:
    """Drop modules that return their input in evaluation: `nn.Identity` and dropout."""
    modules = dict(graph_module.named_modules())
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.Identity | nn.Dropout | nn.Dropout2d):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def fold_batchnorm(graph_module: fx.GraphModule) -> None:
    """Replace a convolution that BatchNorm alone reads, and the BatchNorm, by the one convolution that they equal:

    w' = w · γ/√(running_var + ε)        b' = (b − running_mean) · γ/√(running_var + ε) + β
    """
    modules = dict(graph_module.named_modules())
    graph = graph_module.graph
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.BatchNorm2d):
            continue
        source = node.args[0]
        if source.op != "call_module" or len(source.users) != 1 or calls[str(source.target)] > 1:
            continue
        conv, bn = modules[str(source.target)], modules[str(node.target)]
        if not isinstance(conv, nn.Conv2d):
            continue
        assert isinstance(bn, nn.BatchNorm2d)
        if bn.running_mean is None or bn.running_var is None:
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        node.replace_all_uses_with(source)
        graph.erase_node(node)
