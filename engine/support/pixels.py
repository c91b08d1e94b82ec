"""Images in [-1, 1] and as bytes: the engine's one way from each to the other, grids, and PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from engine.support.files import write_atomically


def to_uint8(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] as uint8 [N, H, W, 3] on the CPU: round(255 · (x + 1)/2)."""
    scaled = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 images of any shape as new float32 ones in [-1, 1], in the same memory format: (x − 127.5)/127.5."""
    return pixels.to(torch.float32, copy=True).sub_(127.5).div_(127.5)


def grid(images: Tensor, columns: int) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] as one uint8 image [3, H', W'], row by row, two pixels apart."""
    return pixel_grid(to_uint8(images), columns)


def pixel_grid(pixels: Tensor, columns: int) -> Tensor:
    """As `grid`, of images uint8 [N, H, W, 3]."""
    from torchvision.utils import make_grid  # here: commands that draw nothing do without its two seconds

    return make_grid(pixels.permute(0, 3, 1, 2), nrow=columns, padding=2, pad_value=64)


def save_png(path: Path, picture: Tensor) -> None:
    """Write an image uint8 [3, H, W] to `path`, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
