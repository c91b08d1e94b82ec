"""What the layers of a critic find in an image, and how its output depends on its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.representation.critics.activation import Rectified
from engine.representation.critics.convolutional import DownsamplingBlock
from engine.representation.critics.critic import LinearCritic
from engine.support.errors import InputError

_UNITS = (Rectified, nn.ReLU, nn.Tanh, DownsamplingBlock)
"""Modules whose outputs are hidden units: activation functions, and blocks that end with a sum."""


def hidden_units(critic: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The critic's outputs [n, F] for images [n, 3, H, W], and the hidden units h_1, h_2, … in order, [n, …] each.

    Hidden units are what activation functions and residual blocks give.
    """
    units: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        units.append(output)

    hooks = [module.register_forward_hook(keep) for module in critic.modules() if isinstance(module, _UNITS)]
    try:
        return critic(images), units
    finally:
        for hook in hooks:
            hook.remove()


class MomentNetwork:
    """The moments Φ of a critic with one output D, averaged over images:

        Φ(x) = [∇_w D(x), s·x, s·h_1(x), s·h_2(x), …]        [K]

    E ∇_w D = ∇_w E D, so that the means take one backward pass, and no image's own gradient is ever there. w has
    neither the last layer's bias, whose derivative is 1 for every image, nor what D does not depend on (`Clip`). The
    critic is taken in evaluation, so that all calls see one network, whatever spectral normalisation does in training.

    Args:
        critic: its weights may change between calls.
        scale: s.

    Raises:
        InputError: "critic", if it hasn't one output that a linear layer gives, or if an image's moments depend on
            other images.
    """

    def __init__(self, critic: nn.Module, scale: float):
        if not isinstance(critic, LinearCritic) or critic.spec.outputs != 1:
            raise InputError("critic", "moments are of a network with one output, a linear function of its features")
        if not critic.per_image:
            raise InputError("critic", "mixes the images of a minibatch, and moments are means of each one's own")
        self.critic, self.scale = critic, scale
        beside = (weight for module in getattr(critic, "beside", ()) for weight in module.parameters())
        left = {critic.last.bias, *beside}
        self.weights = [weight for weight in critic.parameters() if weight not in left]

    def means(self, images: Tensor, count: int, *, create_graph: bool = False) -> Tensor:
        """Σ_n Φ(x_n)/count over images [n, 3, H, W], as [K].

        Args:
            count: of the whole minibatch, so that results of its parts add up.
            create_graph: whether the result has a graph, to the images.
        """
        was = self.critic.training
        self.critic.eval()
        try:
            outputs, units = hidden_units(self.critic, images)
        finally:
            self.critic.train(was)
        of_weights = self.gradient(outputs, count, create_graph=create_graph)
        means = [self.scale / count * layer.sum(dim=0).flatten() for layer in (images, *units)]
        found = torch.cat([of_weights, *means])
        return found if create_graph else found.detach()

    def gradient(self, outputs: Tensor, count: int, *, create_graph: bool) -> Tensor:
        """Σ_n ∇_w D(x_n)/count of outputs [n, 1] that have a graph, flat."""
        parts = torch.autograd.grad(outputs.sum() / count, self.weights, create_graph=create_graph)
        return torch.cat([part.flatten() for part in parts])
