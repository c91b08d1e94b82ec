"""Small networks for points in the plane."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.generation.networks import Generator, GeneratorSpec
from engine.representation.critics.activation import Rectified
from engine.representation.critics.critic import Critic, CriticSpec, LinearCritic

NZ, WIDTH = 4, 64
_SLOPE = 0.2


class PlaneGenerator(Generator):
    """z [N, NZ] to points [N, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = GeneratorSpec("plane", 1, NZ)
        self.layers = _layers(NZ, 2)

    def stages(self) -> list[nn.Sequential]:
        return [self.layers]

    def count_batch(self) -> None:
        """There is no BatchNorm."""


class PlaneCritic(LinearCritic):
    """Points [N, 2] to outputs [N, F]; with a decoder of outputs if it is to draw points again."""

    def __init__(self, outputs: int, decodes: bool = False):
        super().__init__(CriticSpec("plane", 1, outputs), WIDTH)
        self.hidden = nn.Sequential(*_layers(2, WIDTH), Rectified(_SLOPE))
        if decodes:
            self.decoder = _layers(outputs, 2)
            self.decode = self.decoder.forward

    @property
    def beside(self) -> list[nn.Module]:
        """What the outputs do not depend on."""
        return [self.decoder] if hasattr(self, "decoder") else []

    def features(self, images: Tensor) -> Tensor:
        return self.hidden(images)


class PlaneAutoencoder(Critic):
    """Points [N, 2] to ℓ(x) = |x − AE(x)| [N, 1], with a code of one number."""

    def __init__(self) -> None:
        super().__init__(CriticSpec("plane", 1))
        self.encoder, self.decoder = _layers(2, 1), _layers(1, 2)

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.decoder(self.encoder(images))).abs().mean(dim=1, keepdim=True)


class Frozen(nn.Module):
    """A network whose hidden layers are the features of a point, [n, 2] → [n, 2·WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH)
        for layer in (self.first, self.second):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias)  # kinks all over the plane

    def forward(self, points: Tensor) -> Tensor:
        one = self.first(points).relu()
        return torch.cat([one, self.second(one).relu()], dim=1)


def _layers(inputs: int, outputs: int) -> nn.Sequential:
    hidden = (nn.Linear(inputs, WIDTH), Rectified(_SLOPE), nn.Linear(WIDTH, WIDTH), Rectified(_SLOPE))
    return nn.Sequential(*hidden, nn.Linear(WIDTH, outputs))
