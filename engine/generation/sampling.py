"""Images from a generator: of given z, of random z, and between one z and another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.generation.networks import Generator
from engine.generation.priors import Prior
from engine.support.pixels import to_uint8


@dataclass(frozen=True)
class Sampler:
    """A prior and a generator: all that sampling, evaluation and the report know of a run.

    Attributes:
        prior: the law of z.
        generator: z → images. It is left as it is: a copy draws.
        batch_statistics: whether BatchNorm uses the statistics of each batch (the authors' code), not the running ones.
    """

    prior: Prior
    generator: Generator
    batch_statistics: bool = False

    def to(self, device: torch.device | str) -> Sampler:
        """This sampler, with its generator moved to `device`."""
        self.generator.to(device)
        return self

    @torch.no_grad()
    def images(self, z: Tensor, *, batch_size: int = 256) -> Tensor:
        """Images [N, 3, H, W] of `z` [N, nz], float32, in [-1, 1]."""
        return torch.cat([images.float() for images in self._batches(z, batch_size)])

    @torch.no_grad()
    def pixels(self, z: Tensor, *, batch_size: int = 256) -> Tensor:
        """As `images`, but uint8 [N, 3, H, W] on the CPU: a quarter of the memory, only a batch of it as float32."""
        batches = [to_uint8(images).permute(0, 3, 1, 2) for images in self._batches(z, batch_size)]
        return torch.cat(batches).contiguous()

    def draw(self, count: int, seed: int) -> Tensor:
        """`count` images of random z; `seed` decides them."""
        return self.images(self.prior.draw(count, seed).to(self._device))

    def draw_pixels(self, count: int, seed: int) -> Tensor:
        """`count` images of random z as uint8 [count, 3, H, W], computed a batch at a time."""
        return self.pixels(self.prior.draw(count, seed).to(self._device))

    def draw_paths(self, count: int, steps: int, seed: int) -> Tensor:
        """`count` rows of `steps` images that lead from one random z to another, [count · steps, 3, H, W]."""
        ends = self.prior.draw(2 * count, seed).to(self._device)
        return self.images(interpolate(ends[:count], ends[count:], steps))

    @property
    def _device(self) -> torch.device:
        return next(self.generator.parameters()).device

    def _batches(self, z: Tensor, batch_size: int) -> Iterator[Tensor]:
        module = copy.deepcopy(self.generator).train(self.batch_statistics)
        return map(module, z.split(batch_size))


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Great-circle paths between rows of `start` and `end` [R, nz], as [R · steps, nz] (White 2016, section 2.1).

    A straight line between two Gaussian vectors passes through short vectors that a generator never sees; the arc
    sin((1−t)ω)/sin ω · start + sin(tω)/sin ω · end, with ω the angle between them, does not.
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=1).clamp(-1, 1)
    angle = cosine.arccos().view(-1, 1, 1).clamp(min=1e-6)
    t = torch.linspace(0, 1, steps, device=start.device).view(1, -1, 1)
    path = ((1 - t) * angle).sin() * start.unsqueeze(1) + (t * angle).sin() * end.unsqueeze(1)
    return (path / angle.sin()).flatten(0, 1)
