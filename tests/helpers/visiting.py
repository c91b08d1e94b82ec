"""Networks for tests of tapping, and the plainest visitor."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": torch.relu, "relu6": F.relu6, "none": lambda x: x}


def enliven(network):
    """Random running statistics and scales, so that nothing is an identity by accident."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.5)
            nn.init.uniform_(module.running_var, 0.3, 3)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.5)
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
