"""What every critic is: hidden features of an image, and a linear layer on them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CriticSpec:
    """What a critic is built from: the arguments of `build_critic`, but for the weights that it starts from."""

    name: str
    image_size: int
    outputs: int = 1
    norm: str = "none"
    minibatch_discrimination: bool = False


class Critic(nn.Module):
    """D(x; ψ): images [N, 3, H, W] in [-1, 1] to outputs [N, F], which a game compares.

    Attributes:
        spec: what it was built from.
        discrimination: statistics of the whole minibatch beside each image's own features; None for none.
    """

    def __init__(self, spec: CriticSpec):
        super().__init__()
        self.spec = spec
        self.discrimination: MinibatchDiscrimination | None = None

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to the last hidden layer's features [N, h]."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to outputs [N, F]."""

    @property
    def has_batchnorm(self) -> bool:
        """Whether there is BatchNorm, which a penalty of each image's own gradient makes no sense with."""
        return any(isinstance(module, nn.BatchNorm2d) for module in self.modules())

    @property
    def per_image(self) -> bool:
        """Whether an image's outputs depend on this image alone.

        If so, real and generated images may go through in one pass. If not, each of the two is a minibatch of its own.
        """
        return self.discrimination is None and not self.has_batchnorm


class LinearCritic(Critic):
    """A critic whose outputs are one linear layer, `last`, on its features.

    Args:
        width: h, the number of features.
    """

    def __init__(self, spec: CriticSpec, width: int):
        super().__init__(spec)
        if spec.minibatch_discrimination:
            self.discrimination = MinibatchDiscrimination(width)
            width += self.discrimination.kernels
        self.last = nn.Linear(width, spec.outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to outputs [N, F]."""
        hidden = self.features(images)
        if self.discrimination is not None:
            hidden = torch.cat((hidden, self.discrimination(hidden)), dim=1)
        return self.last(hidden)


class MinibatchDiscrimination(nn.Module):
    """How close an image is to the others of its minibatch (Salimans et al. 2016, section 3.2).

        M_i = f(x_i) T  [B, C]        c_b(i, j) = exp(−‖M_ib − M_jb‖₁)        o_b(i) = Σ_j c_b(i, j)

    The sum is over all j, i among them, as the paper has it. The minibatch is that of this process.

    Args:
        width: h, the number of features.
        kernels, dimensions: B and C. The paper's experiments have 100 kernels of 5 dimensions.

    T starts N(0, 1/h): columns of length 1 on average, the length that their code keeps them at.
    """

    def __init__(self, width: int, kernels: int = 100, dimensions: int = 5):
        super().__init__()
        self.kernels, self.dimensions = kernels, dimensions
        self.weight = nn.Parameter(torch.empty(width, kernels * dimensions))
        nn.init.normal_(self.weight, 0.0, width**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """[N, h] to [N, B]. Memory N²·B·C."""
        projected = (features @ self.weight).view(len(features), self.kernels, self.dimensions)
        distances = (projected.unsqueeze(0) - projected.unsqueeze(1)).abs().sum(dim=3)
        return distances.neg().exp().sum(dim=1)
