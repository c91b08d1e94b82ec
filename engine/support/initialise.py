"""Initial weights that generators, critics and decoders have in common."""

from __future__ import annotations

from torch import nn


def initialise_normal(module: nn.Module) -> None:
    """DCGAN's (Radford et al. 2016, section 4): weights N(0, 0.02), BatchNorm's scales N(1, 0.02), biases 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
