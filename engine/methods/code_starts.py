"""Where codes of real images begin: their principal components."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from engine.support.errors import InputError

_CELLS, _INSIDE = 16, 0.9
"""Images are averaged to at most so many cells a side; the share of codes that lie inside the ball from the start."""


def most_dimensions(image_size: int) -> int:
    """How many principal components images of this size have here at most: numbers of their cells."""
    return 3 * min(image_size, _CELLS) ** 2


def principal_codes(images: Iterable[tuple[Tensor, Tensor]], count: int, nz: int, *, radius: float = 1.0) -> Tensor:
    """The whitened principal components of the images, scaled to a ball: codes [count, nz] float32, on the CPU.

        z_i = s Λ^−½ Vᵀ(x_i − x̄)      Λ, V: the nz largest eigenvalues of the images' covariance and their eigenvectors

    Images whose pixels are alike begin with like codes, which is what lets a generator learn between them (Bojanowski
    et al. 2018, Optimizing the Latent Space of Generative Networks, offer the same start). x_i are the averages of an
    image's at most 16×16 cells, 768 numbers: a covariance of all pixels would be far larger and say little more. s puts
    nine codes of ten inside the ball, and the others are projected to it. Signs are such that each eigenvector's
    largest entry is positive. All in float64, in two passes over the images.

    Args:
        images: gives (images [n, 3, H, W] with values in [−1, 1], their numbers [n]), the same in every pass.
        count: codes; an image that is not given has the code 0.
        nz: their dimensions; those in which the images do not vary are 0.
        radius: of the ball.

    Raises:
        InputError: "nz", if there are more dimensions than an image has numbers here.
    """
    total: Tensor | None = None
    products: Tensor | None = None
    seen = 0
    for batch, _ in images:
        cells = _cells(batch)
        if total is None or products is None:
            size = cells.shape[1]
            if nz > size:
                raise InputError("nz", f"principal components of these images have at most {size} dimensions, got {nz}")
            total, products = cells.new_zeros(size), cells.new_zeros(size, size)
        seen += len(cells)
        total += cells.sum(dim=0)
        products.addmm_(cells.T, cells)
    codes = torch.zeros(count, nz, dtype=torch.float64)
    if total is None or products is None:
        return codes.float()
    mean = total / seen
    values, vectors = torch.linalg.eigh(products / seen - torch.outer(mean, mean))
    values, vectors = values.flip(0)[:nz], vectors.flip(1)[:, :nz]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    floor = len(products) * torch.finfo(torch.float64).eps * products.diagonal().max() / seen
    scales = torch.where(values > floor, values.clamp(min=floor).rsqrt(), 0.0)
    for batch, numbers in images:
        codes[numbers.cpu()] = (_cells(batch) - mean) @ vectors * scales
    norms = codes.norm(dim=1, keepdim=True)
    usual = norms.quantile(_INSIDE)
    if float(usual):
        codes *= radius / torch.maximum(usual, norms)
    return codes.float()


def _cells(images: Tensor) -> Tensor:
    """Averages of cells, [n, F] float64 on the CPU."""
    return adaptive_avg_pool2d(images.cpu().double(), min(images.shape[-1], _CELLS)).flatten(1)
