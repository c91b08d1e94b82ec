"""A generator in low precision, whose weights are converted all at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.generation.networks import Generator, run_generator

_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class LowPrecision:
    """Convolutions and linear layers in a low dtype: bit for bit what `torch.autocast` makes of a generator.

    Autocast converts weight by weight, and gradient by gradient. Here one operation copies all weights before the
    forward pass, and one copies all gradients back after the backward pass. BatchNorm's parameters, and everything that
    the optimizer sees, stay as they are.

    Args:
        generator: on its device.
        dtype: bfloat16 or float16.
    """

    def __init__(self, generator: Generator, dtype: torch.dtype):
        self.generator, self.dtype = generator, dtype
        layers = [module for module in generator.modules() if isinstance(module, _LAYERS)]
        self.weights: list[Tensor] = [weight for layer in layers for weight in layer.parameters(recurse=False)]
        self.copies = [torch.empty_like(weight, dtype=dtype).requires_grad_() for weight in self.weights]
        self.gradients = [torch.empty_like(weight, requires_grad=False) for weight in self.weights]

    def copy_weights(self) -> None:
        """The copies become what the weights are now, without the gradients that a step left which came to no end."""
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.weights)
        for copy in self.copies:
            copy.grad = None

    def images(self, z: Tensor, *, recompute: bool = False, copied: bool = False) -> Tensor:
        """Images of `z` in the low dtype.

        Args:
            recompute: as in `run_generator`.
            copied: whether `copy_weights` has been called since the weights changed; otherwise it is called here.
        """
        if not copied:
            self.copy_weights()
        low = dict(zip(map(id, self.weights), self.copies, strict=True))
        return run_generator(self.generator, z.to(self.dtype), recompute=recompute, weights=low)

    def collect_gradients(self) -> None:
        """After backward: the copies' gradients become those of the weights, in place of what was there."""
        found = [copy.grad for copy in self.copies if copy.grad is not None]
        assert len(found) == len(self.copies), "every layer takes part"
        torch._foreach_copy_(self.gradients, found)
        for weight, copy, gradient in zip(self.weights, self.copies, self.gradients, strict=True):
            weight.grad, copy.grad = gradient, None
