"""What an array of pictures means: only layouts that have one reading are taken, and the log says which one it was."""

from __future__ import annotations

import logging
import math

import numpy as np

from pipelines.errors import DataError

_COLOURS = (1, 3)
_GREY = "save grey pictures as [N, H, W, 1], or one colour picture as [1, H, W, 3]"
log = logging.getLogger("gfmn")


def to_nhwc(images: np.ndarray, where: str) -> np.ndarray:
    """uint8 [N, H, W, 3], [N, H, W, 1], [N, 3, H, W], [N, 1, H, W] or [N, H, W] → [N, H, W, 3], grey repeated.

    Args:
        where: the file, for messages.

    Raises:
        DataError: other numbers than uint8, no images, or a shape that has no reading or more than one. The message
            says what to do, for other numbers with the conversion that fits their range.
    """
    if images.dtype != np.uint8:
        raise DataError(
            f"{where}: holds {_described(images)}, but images are uint8 from 0 to 255; {_conversion(images)}"
        )
    if images.size == 0:
        raise DataError(f"{where}: holds no images (shape {list(images.shape)})")
    layout = _layout(images.shape, where)
    if layout != "[N, H, W, 3]":
        log.info("%s: shape %s is read as %s", where, list(images.shape), layout)
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[3] not in _COLOURS:
        images = images.transpose(0, 2, 3, 1)
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


def _layout(shape: tuple[int, ...], where: str) -> str:
    """The one reading of a shape, in words."""
    if len(shape) == 4:
        last, first = shape[3] in _COLOURS, shape[1] in _COLOURS
        if last and first:
            raise _ambiguous(shape, where, "[N, H, W, C] or [N, C, H, W]", "enlarge pictures so narrow")
        if last:
            return f"[N, H, W, {shape[3]}]"
        if first:
            return f"[N, {shape[1]}, H, W]"
    if len(shape) == 3:
        if shape[0] == 3 or shape[2] in (1, 3, 4):
            raise _ambiguous(shape, where, "grey pictures or one colour picture", _GREY)
        if shape[0] == shape[1] != shape[2]:
            raise _ambiguous(shape, where, "[N, H, W] or [H, W, N]", _GREY)
        return "[N, H, W], grey"
    raise DataError(
        f"{where}: has shape {list(shape)}, but images are [N, H, W, 3], [N, 3, H, W] or [N, H, W]; {_remedy(shape)}"
    )


def _ambiguous(shape: tuple[int, ...], where: str, readings: str, remedy: str) -> DataError:
    return DataError(f"{where}: shape {list(shape)} could mean {readings}; {remedy}")


def _remedy(shape: tuple[int, ...]) -> str:
    """What makes pictures of an array of a shape that has no reading."""
    if len(shape) == 4 and shape[3] == 4:
        return "save images[..., :3], without alpha"
    if len(shape) == 4 and shape[1] == 4:
        return "save images[:, :3], without alpha"
    if len(shape) == 4 and shape[2] in _COLOURS:
        return "save np.moveaxis(images, -1, 0)"
    if len(shape) == 2:
        side, colour_side = math.isqrt(shape[1]), math.isqrt(shape[1] // 3)
        if side * side == shape[1]:
            return f"if each row is a grey picture, save images.reshape(-1, {side}, {side}, 1)"
        if 3 * colour_side * colour_side == shape[1]:
            return (
                f"if each row is a picture, save images.reshape(-1, 3, {colour_side}, {colour_side}), "
                f"or images.reshape(-1, {colour_side}, {colour_side}, 3) where colours come last"
            )
    return "save it in one of these"


def _described(images: np.ndarray) -> str:
    if images.dtype.kind in "fiu" and images.size:
        low, high = images.min(), images.max()
        if np.isfinite(low) and np.isfinite(high):
            return f"{images.dtype} from {low:.4g} to {high:.4g}"
        return f"{images.dtype} with values that are not finite"
    return str(images.dtype)


def _conversion(images: np.ndarray) -> str:
    """The NumPy expression that makes bytes of other numbers, by their range."""
    kind = images.dtype.kind
    if kind == "b":
        return "save images.astype('uint8') * 255"
    if kind not in "fiu" or images.size == 0:
        return "save it as uint8"
    low, high = float(images.min()), float(images.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        return "replace the values that are not finite first"
    if low >= 0 and high <= 1:
        return "save (images * 255.0).round().astype('uint8')"
    if kind == "f" and low >= -1 and high <= 1:
        return "save ((images + 1) * 127.5).round().astype('uint8')"
    if low >= 0 and high <= 255:
        return "save images.round().astype('uint8')"
    if low >= 0 and high <= 65535:
        return "save (images / 257).round().astype('uint8')"
    if low == high:
        return "save it as uint8"
    return f"save ((images - {low:.6g}) * {255 / (high - low):.6g}).clip(0, 255).round().astype('uint8')"
