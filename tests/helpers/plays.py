"""Critic steps to try penalties on: a critic that can be written out by hand, and numbers that ranks share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from engine.comparison.games.penalties import Play


class TwoLayers(nn.Module):
    """φ(x) = W2 tanh(W1 x + b1) + b2 of flattened images [n, 3, size, size]; float64."""

    def __init__(self, size: int = 2, outputs: int = 1, hidden: int = 4, seed: int = 0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        pixels = 3 * size * size

        def drawn(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=random, dtype=torch.float64) * scale)

        self.w1, self.b1 = drawn(hidden, pixels, scale=pixels**-0.5), drawn(hidden, scale=0.3)
        self.w2, self.b2 = drawn(outputs, hidden, scale=1.0), drawn(outputs, scale=0.3)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.w1.T + self.b1) @ self.w2.T + self.b2


class WithDecoder(TwoLayers):
    """`TwoLayers` that draws images from its outputs: tanh(V φ)."""

    def __init__(self, size: int = 2, outputs: int = 1, hidden: int = 4, seed: int = 0):
        super().__init__(size, outputs, hidden, seed)
        self.size = size
        self.decoder = nn.Linear(outputs, 3 * size * size, bias=False, dtype=torch.float64)

    @property
    def beside(self) -> list[nn.Module]:
        return [self.decoder]

    def decode(self, outputs: Tensor) -> Tensor:
        return torch.tanh(self.decoder(outputs)).view(-1, 3, self.size, self.size)


@dataclass
class Stream:
    """Numbers for `count` images, of which this rank sees the rows `own`; `drawn` keeps all that were given."""

    count: int
    own: slice = field(default_factory=lambda: slice(None))
    seed: int = 5

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.drawn: list[Tensor] = []

    def __call__(self, columns: int) -> Tensor:
        self.drawn.append(torch.rand(self.count, columns, generator=self.random, dtype=torch.float64))
        return self.drawn[-1][self.own]


def images(count: int, size: int = 2, seed: int = 1) -> Tensor:
    """[count, 3, size, size] in [-1, 1], float64, requiring a gradient."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, 3, size, size, generator=random, dtype=torch.float64) * 2 - 1
    return drawn.requires_grad_()


def play_of(critic: nn.Module, real: Tensor, fake: Tensor, own: slice = slice(None)) -> Play:
    """The critic's step on all images, as the rank that has the rows `own` sees it."""
    return Play(
        critic=critic,
        real=real[own],
        fake=fake[own],
        phi_real=critic(real),
        phi_fake=critic(fake),
        uniform=Stream(len(real), own),
        own=own,
    )
