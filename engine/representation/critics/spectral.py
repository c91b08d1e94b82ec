"""Spectral normalisation of a critic's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

_FIRST_ITERATIONS = 15


class SpectralNorm(nn.Module):
    """W̄ = γ W/σ(W): a weight by its largest singular value, as a matrix [out, the rest].

    One step of the power iteration a forward in training (Miyato et al. 2018, algorithm 1):

        v ← Wᵀu/‖Wᵀu‖        u ← W v/‖W v‖        σ = uᵀ W v

    u and v are constants to autograd, W is none: ∂σ/∂W = u vᵀ, and W̄ can be differentiated as often as is wanted. Both
    are buffers: a run that goes on from a saved state takes the same steps. Every forward in training moves them, also
    one without a gradient; a forward in evaluation uses them as they are. So a critic step moves them once
    with the images of both kinds, and once more with every pass of a penalty's own; the generator's step, once.

    The numbers are those of `torch.nn.utils.parametrizations.spectral_norm` for the same u and v. That one copies
    channels_last weights every time, and goes through half precision under CUDA's autocast; σ is in the weight's own
    dtype here.

    Args:
        weight: [out, ...]; the first u and v are of a few steps on it.
        scaled: with the learned γ of SN-SMMD (Arbel et al. 2018, section 4), which starts at 1; otherwise γ = 1.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, *, scaled: bool):
        super().__init__()
        self.gamma = nn.Parameter(weight.new_ones(())) if scaled else None
        with torch.no_grad():
            matrix = _matrix(weight)
            self.register_buffer("u", F.normalize(torch.randn_like(matrix[:, 0]), dim=0))
            self.register_buffer("v", torch.empty_like(matrix[0]))
            for _ in range(_FIRST_ITERATIONS):
                self._iterate(matrix)

    def forward(self, weight: Tensor) -> Tensor:
        """W to W̄, of the same shape and memory format."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = _matrix(weight)
            if self.training:
                with torch.no_grad():
                    self._iterate(matrix)
            # Copies, which the next forward does not change before this one's backward.
            sigma = self.u.clone() @ (matrix @ self.v.clone())
            return weight / sigma if self.gamma is None else weight * (self.gamma / sigma)

    def _iterate(self, matrix: Tensor) -> None:
        self.v.copy_(F.normalize(self.u @ matrix, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))


def _matrix(weight: Tensor) -> Tensor:
    """[out, the rest], a view of channels_last weights: the order of its columns does not matter to σ."""
    return weight.movedim(1, -1).flatten(1)


def normalise_spectrally(layers: Iterable[nn.Module], *, scaled: bool) -> None:
    """Every convolution and linear layer uses W̄ from now on; `parametrizations.weight.original` is W, which learns."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            norm = SpectralNorm(layer.weight.detach(), scaled=scaled)
            parametrize.register_parametrization(layer, "weight", norm)
