"""Images from a generator: of given z, of random z, and between one z and another."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.generation.networks import Generator
from engine.generation.priors import Prior, draw_batches
from engine.support.pixels import to_uint8

_BATCH, _SIDE = 256, 32
"""Images in a batch, and their side; see `Sampler.batch_size`."""

_ALL = slice(None)


class ImageEncoder(Protocol):
    """A network from images [N, 3, H, W] in [-1, 1] to their codes [N, nz], and what is needed to build it again.

    Attributes:
        name, gaussian, bounded: see `engine.representation.encoders`.
    """

    name: str
    gaussian: bool
    bounded: bool

    def __call__(self, images: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> Any: ...

    def to(self, device: torch.device | str) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...


@dataclass(frozen=True)
class Sampler:
    """A prior and a generator, and what knows the codes of real images: all that sampling, evaluation and the report
    know of a run.

    Attributes:
        prior: the law of z.
        generator: z → images. It is left as it is: a copy draws.
        batch_statistics: whether BatchNorm uses the statistics of each batch (the authors' code), not the running ones.
        encoder: of a method that has one. It is left as it is: a copy encodes, with running statistics.
        codes: of a method that has learnt one for each of M real images: [M, nz], in their data set's order.
    """

    prior: Prior
    generator: Generator
    batch_statistics: bool = False
    encoder: ImageEncoder | None = None
    codes: Tensor | None = None

    def to(self, device: torch.device | str) -> Sampler:
        """This sampler, with its networks moved to `device`."""
        self.generator.to(device)
        if self.encoder is not None:
            self.encoder.to(device)
        return self

    @property
    def knows_codes(self) -> bool:
        """Whether real images have codes: an encoder's, or learnt ones."""
        return self.encoder is not None or self.codes is not None

    @property
    def batch_size(self) -> int:
        """Images that are computed at a time: 256 of 32 pixels, and as many of a larger size as need no more memory.

        With batch statistics always 256, because every image depends on the others of its batch.
        """
        side = self.generator.spec.image_size
        return _BATCH if self.batch_statistics else max(_BATCH * _SIDE**2 // side**2, 16)

    @property
    def indivisible(self) -> int:
        """Consecutive images that have to be drawn together to be the same: a batch with batch statistics, else 1."""
        return self.batch_size if self.batch_statistics else 1

    def images(self, z: Tensor) -> Tensor:
        """Images [N, 3, H, W] of `z` [N, nz], float32, in [-1, 1]."""
        return torch.cat([images.float() for images in self._batches(z.split(self.batch_size))])

    def encode(self, images: Tensor) -> Tensor:
        """The encoder's codes [N, nz] of `images` [N, 3, H, W] in [-1, 1], float32 on the CPU. ValueError without an
        encoder."""
        if self.encoder is None:
            raise ValueError("there is no encoder")
        network, device = copy.deepcopy(self.encoder), next(self.generator.parameters()).device
        network.train(False)
        with torch.no_grad():
            parts = [network(part.to(device)).float().cpu() for part in images.split(self.batch_size)]
        return torch.cat(parts)

    def decode(self, codes: Tensor) -> Tensor:
        """As `images`, but by running statistics, whatever `batch_statistics` says: each depends on its code alone."""
        return dataclasses.replace(self, batch_statistics=False).images(codes)

    def draw(self, count: int, seed: int) -> Tensor:
        """`count` images of random z; `seed` decides them."""
        return self.images(self.prior.draw(count, seed))

    def draw_pixels(self, count: int, seed: int, rows: slice = _ALL) -> Tensor:
        """The images of `draw` as uint8 [count, 3, H, W] on the CPU; with `rows` only those, which start at a multiple
        of `indivisible`."""
        side, z = self.generator.spec.image_size, self.prior.draw(count, seed)[rows]
        pixels = torch.empty(len(z), 3, side, side, dtype=torch.uint8)
        if len(z):
            batches = map(to_uint8, self._batches(z.split(self.batch_size)))
            for part, batch in zip(pixels.split(self.batch_size), batches, strict=True):
                part.copy_(batch.permute(0, 3, 1, 2))
        return pixels

    def pixel_batches(self, count: int, seed: int) -> Iterator[Tensor]:
        """The images of `draw` as uint8 [n, H, W, 3] on the CPU, a batch at a time: never more in memory."""
        return map(to_uint8, self._batches(draw_batches(self.prior, count, seed, self.batch_size)))

    def draw_paths(self, count: int, steps: int, seed: int) -> Tensor:
        """`count` rows of `steps` images that lead from one random z to another, [count · steps, 3, H, W]."""
        ends = self.prior.draw_ends(2 * count, seed)
        return self.images(self.prior.between(ends[:count], ends[count:], steps))

    def path_batches(self, count: int, steps: int, seed: int) -> Iterator[Tensor]:
        """The images of `draw_paths` as `pixel_batches` gives them, whole rows at a time."""
        ends, rows = self.prior.draw_ends(2 * count, seed), max(self.batch_size // steps, 1)
        pairs = zip(ends[:count].split(rows), ends[count:].split(rows), strict=True)
        return map(to_uint8, self._batches(self.prior.between(start, end, steps) for start, end in pairs))

    def _batches(self, z: Iterable[Tensor]) -> Iterator[Tensor]:
        module = copy.deepcopy(self.generator).train(self.batch_statistics)
        device = next(self.generator.parameters()).device
        for batch in z:
            with torch.no_grad():
                images = module(batch.to(device))
            yield images
