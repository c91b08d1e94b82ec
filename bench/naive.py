"""The implementation that everybody would write first, from the paper's section 2.2: what the engine is compared with.

All ReLU outputs of the plain networks are kept, concatenated to one [N, D] tensor, and reduced by `mean(0)` and
`var(0)`; two Adams move the two moving averages; autograd does the rest, through extractors whose parameters nobody
has frozen. Its obvious improvements are switches.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from engine.comparison.distances.moments import Moments

# In a pair the paper counts the first 16 layers of each network.
LAYERS = 16


class NaiveMatching(nn.Module):
    """Feature matching with AMA (paper, section 2.2) in plain PyTorch.

    Calling it takes one step of AMA on `images` [N, 3, H, W] and returns the loss; `backward()` of that reaches the
    images (and the extractors' parameters, unless `frozen`).

    Args:
        networks: plain modules with ReLU; used in evaluation mode. Their parameters are theirs: not copied.
        target: moments of the data.
        ama_lr: α of AMA, β1 = 0.9, β2 = 0.999.
        frozen: parameters of the networks need no gradient.
        compiled: networks, concatenation, mean and variance go through torch.compile.
        autocast: dtype of `torch.autocast`, None for none.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        target: Moments,
        *,
        ama_lr: float = 1e-5,
        frozen: bool = False,
        compiled: bool = False,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.networks = nn.ModuleList(_with_relu_outputs(network) for network in networks)
        self.networks.eval().requires_grad_(not frozen)
        self.autocast = autocast
        device = next(self.networks.parameters()).device
        self.target_mean = target.mean.float().to(device)
        self.target_variance = target.variance().float().to(device)
        self.v_mean = nn.Parameter(torch.zeros_like(self.target_mean))
        self.v_variance = nn.Parameter(torch.zeros_like(self.target_variance))
        self.adam_mean = torch.optim.Adam([self.v_mean], lr=ama_lr)
        self.adam_variance = torch.optim.Adam([self.v_variance], lr=ama_lr)
        self.moments = torch.compile(self._moments) if compiled else self._moments

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        taps = [tap for network in self.networks for tap in network(images).values()]
        features = torch.cat([tap.flatten(1) for tap in taps], dim=1).float()
        return features.mean(0), features.var(0)

    def forward(self, images: Tensor) -> Tensor:
        """One step of AMA; returns the loss."""
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            mean, variance = self.moments(images)
        difference_mean, difference_variance = self.target_mean - mean, self.target_variance - variance
        for v, adam, difference in (
            (self.v_mean, self.adam_mean, difference_mean),
            (self.v_variance, self.adam_variance, difference_variance),
        ):
            adam.zero_grad()
            (0.5 * (v - difference.detach()).square().sum()).backward()
            adam.step()
        return (self.v_mean.detach() * difference_mean).sum() + (self.v_variance.detach() * difference_variance).sum()


def _with_relu_outputs(network: nn.Module) -> nn.Module:
    """`network` as a module that returns its first `LAYERS` ReLU outputs, by torchvision's own tool."""
    modules = dict(network.named_modules())
    _, names = get_graph_node_names(network)
    relus = [name for name in names if isinstance(modules.get(name), nn.ReLU) or name.split(".")[-1].startswith("relu")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_feature_extractor(network.eval(), {name: name for name in relus[:LAYERS]})
