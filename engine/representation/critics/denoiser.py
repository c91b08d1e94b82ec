"""A denoiser of a critic's features."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class Denoiser(nn.Module):
    """r: features with noise [n, h] to features without [n, h] (Warde-Farley & Bengio 2017).

    Linear layers, BatchNorm and ReLU after each but the last. The source has 10 with 1,024 units. He initialisation,
    zero biases. In evaluation it goes by running statistics, which are those of real features alone.

    Args:
        features: h.
        width: units of a hidden layer.
        layers: how many linear layers.
    """

    def __init__(self, features: int, width: int = 1024, layers: int = 10):
        super().__init__()
        sizes = [features, *[width] * (layers - 1)]
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            # Maps of one position: BatchNorm over all ranks is one of maps.
            map_ = [nn.Unflatten(1, (after, 1, 1)), nn.BatchNorm2d(after), nn.Flatten()]
            parts += [nn.Linear(before, after, bias=False), *map_, nn.ReLU()]
        self.layers = nn.Sequential(*parts, nn.Linear(sizes[-1], features))
        self.apply(_initialise)

    def forward(self, features: Tensor) -> Tensor:
        """[n, h] to [n, h]."""
        return self.layers(features)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
