"""Vision transformers of timm as networks with taps: the tokens after every block are a map of features.

A tap of T tokens of width C is [N, C, T, 1]: a channel is a feature, a position a token (class and register tokens
first). Pooling by "mean" averages over tokens.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from engine.representation.tracing.tap import Leaves, Mark

Transformer = Any
"""A `timm.models.vision_transformer.VisionTransformer`."""


class _Stem(nn.Module):
    """Images to the first block's tokens [N, T, C]: patches, positions, class token."""

    def __init__(self, transformer: Transformer):
        super().__init__()
        # One of the two registers every parameter; the other would double them in a state dict.
        self.transformer = transformer

    def forward(self, x: Tensor) -> Tensor:
        transformer = self.transformer
        tokens = transformer._pos_embed(transformer.patch_embed(x))
        return transformer.norm_pre(transformer.patch_drop(tokens))


class Tokens(nn.Module):
    """A vision transformer whose tokens are tapped after every block, and once more after the last norm.

    Args:
        transformer: of timm, made with `dynamic_img_size=True`, which takes images of any whole number of patches.
    """

    def __init__(self, transformer: Transformer):
        super().__init__()
        self.blocks = transformer.blocks
        self.norm = transformer.norm
        self.block = nn.ModuleList(Mark() for _ in transformer.blocks)
        self.last = Mark()
        self.stem = _Stem(_without_blocks(transformer))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to tokens [N, T, C]."""
        tokens = self.stem(x)
        for block, mark in zip(self.blocks, self.block, strict=True):
            tokens = _tapped(mark, block(tokens))
        return _tapped(self.last, self.norm(tokens))


def leaves_of(transformer: Transformer) -> Leaves:
    """What torch.fx need not look into: whatever is in them goes through autograd."""
    return Leaves((_Stem, *{type(block) for block in transformer.blocks}, type(transformer.norm)))


def _without_blocks(transformer: Transformer) -> Transformer:
    """The transformer for its stem alone, which shares its parameters."""
    stem = copy.copy(transformer)
    stem._modules = dict(transformer._modules)
    for unused in ("blocks", "norm", "fc_norm", "head"):
        setattr(stem, unused, nn.Identity())
    return stem


def _tapped(mark: nn.Module, tokens: Tensor) -> Tensor:
    """Through a tap, [N, T, C] as the map [N, C, T, 1], which lies in memory as before (channels last)."""
    return mark(tokens.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)
