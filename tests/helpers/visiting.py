"""Networks for tests of tapping, and the plainest visitor."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": torch.relu, "relu6": F.relu6, "none": lambda x: x}


def enliven(network: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Random BatchNorm statistics, scales and shifts in place, so that nothing is an identity by accident and features
    are neither dead nor all alike; returns the network in evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, 0, 0.5, generator)
            nn.init.uniform_(module.running_var, 0.3, 3, generator)
            nn.init.uniform_(module.weight, 0.5, 2, generator)
            nn.init.normal_(module.bias, 0, 0.5, generator)
    return network.eval()


def run(graph, sites, images):
    """Taps by name."""
    taps = {}

    def visit(index: int, x: Tensor, residual: Tensor | None) -> Tensor:
        site = next(site for site in sites if site.index == index)
        taps[site.name] = ACTIVATIONS[site.activation](x if residual is None else x + residual)
        return taps[site.name]

    graph(images, visit)
    return taps
