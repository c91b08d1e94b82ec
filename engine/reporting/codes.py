"""What a run makes of real images by their codes: reconstructions, the nearest codes of samples, and ways between."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.generation.priors import straight
from engine.generation.saved import SavedSampler
from engine.reporting.neighbours import nearest_rows
from engine.reporting.pictures import Picture, as_picture, upper_left
from engine.reporting.real import RealImages
from engine.support.pixels import pixel_grid, to_float, to_uint8
from engine.training.run_folder import COLUMNS

log = logging.getLogger("gfmn")

_CODED = 2000  # real images at most, among whose codes the nearest are looked for
_ROWS, _PATHS = 2, 4  # of pairs, and of ways from one image to another
_LARGE = 64  # pixels; of larger images there are half as many


@dataclass(frozen=True)
class CodesSection:
    """What the section "Codes of real images" shows; only `missing`, the reason, if it is left out.

    Attributes:
        learnt: whether codes were learnt one by one, with no encoder.
        unchecked: whether nothing tells if they were learnt from the pictures that the data set has now.
        reconstructions: rows of real images, and below each what the generator makes of its code.
        nearest: rows of samples, and below each the real image whose code is nearest.
        paths: rows from one real image to another, with images on the straight line between their codes.
        coded: real images among which the nearest were looked for.
    """

    missing: str | None = None
    learnt: bool = False
    unchecked: bool = False
    reconstructions: Picture | None = None
    nearest: Picture | None = None
    paths: Picture | None = None
    coded: int = 0


def codes_section(
    sampler: SavedSampler, real: RealImages, pixels: Tensor | None, numbers: Tensor | None, seed: int
) -> CodesSection | None:
    """What a sampler that knows codes of real images has to show; None for one that knows none.

    Args:
        sampler: with an encoder, or with learnt codes.
        real: the data set, whose images these codes are of.
        pixels, numbers: of its images uint8 [N, 3, H, W] and their places in it [N]; None if they can't be read.
        seed: of the samples' z.
    """
    if not sampler.knows_codes:
        return None
    if pixels is None or numbers is None or not len(pixels):
        return CodesSection(missing=real.missing or "no real image can be read")
    learnt = sampler.encoder is None
    learnt_from = sampler.codes_of or real.trained.get("data_content_sha256")
    if learnt and (other := _other_images(sampler, real, learnt_from)) is not None:
        log.warning("warning: no codes of real images in the report: %s", other)
        return CodesSection(missing=other)
    chosen = torch.arange(min(len(pixels), _CODED)) * len(pixels) // min(len(pixels), _CODED)
    pixels, numbers = pixels[chosen], numbers[chosen]
    codes = _codes(sampler, pixels, numbers)
    columns = COLUMNS if pixels.shape[-1] <= _LARGE else COLUMNS // 2
    count = _ROWS * columns
    shown = torch.arange(count) * len(pixels) // count  # evenly spaced
    z = sampler.prior.draw(count, seed)
    nearest = nearest_rows(z, codes, 1)[0][:, 0]
    chosen_ends = 2 * _PATHS if columns == COLUMNS else _PATHS
    ends = torch.arange(chosen_ends) * len(pixels) // chosen_ends
    return CodesSection(
        learnt=learnt,
        unchecked=learnt and learnt_from is None,
        reconstructions=_pairs(pixels[shown], _drawn(sampler, codes[shown]), columns),
        nearest=_pairs(_drawn(sampler, z), pixels[nearest], columns),
        paths=_paths(sampler, pixels[ends], codes[ends], columns),
        coded=len(pixels),
    )


def _other_images(sampler: SavedSampler, real: RealImages, learnt_from: str | None) -> str | None:
    """Why the learnt codes are not those of the data set's images; None if they are, as far as can be told.

    Args:
        learnt_from: the digest of the pictures that they were learnt from; None if nothing tells it.
    """
    assert sampler.codes is not None
    assert real.dataset is not None
    learnt, images = len(sampler.codes), len(real.dataset)
    if learnt != images:
        return f"codes of {learnt} images were learnt, and the data set has {images} now"
    changed = learnt_from is not None and learnt_from != real.dataset.fingerprint()["content_sha256"]
    return "the data set's pictures have changed since the codes were learnt" if changed else None


def _codes(sampler: SavedSampler, pixels: Tensor, numbers: Tensor) -> Tensor:
    if sampler.encoder is not None:
        return sampler.encode(to_float(pixels))
    assert sampler.codes is not None
    return sampler.codes[numbers]


def _drawn(sampler: SavedSampler, codes: Tensor) -> Tensor:
    """uint8 [N, 3, H, W]."""
    return to_uint8(sampler.decode(codes)).permute(0, 3, 1, 2)


def _pairs(above: Tensor, below: Tensor, columns: int) -> Picture:
    """A row of images uint8 [N, 3, H, W] over a row of others, and so on."""
    rows = zip(above.split(columns), below.split(columns), strict=True)
    return _picture(torch.cat([row for pair in rows for row in pair]), columns)


def _paths(sampler: SavedSampler, pixels: Tensor, codes: Tensor, columns: int) -> Picture:
    """From every second image to the one after it; codes at the ends of a way are those of the images, which stand
    there themselves."""
    starts, ends = pixels[::2], pixels[1::2]
    drawn = _drawn(sampler, straight(codes[::2], codes[1::2], columns)).unflatten(0, (len(starts), columns)).clone()
    drawn[:, 0], drawn[:, -1] = starts, ends
    return _picture(drawn.flatten(0, 1), columns)


def _picture(pixels: Tensor, columns: int) -> Picture:
    side = pixels.shape[-1]
    return upper_left(as_picture(pixel_grid(pixels.permute(0, 2, 3, 1), columns)), side)
