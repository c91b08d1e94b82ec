"""Images from a generator: of given z, of random z, and on the way from one z to another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.configuration.config import Config
from engine.support.errors import InputError
from engine.support.pixels import to_uint8
from engine.training.checkpoint import SavedGenerator, load_generator
from engine.training.run_folder import RunFolder


@torch.no_grad()
def sample(generator: nn.Module, z: Tensor, *, batch_statistics: bool = False, batch_size: int = 256) -> Tensor:
    """Images [N, 3, H, W] of `z` [N, nz], float32, in [-1, 1]; the generator itself is left as it was.

    With `batch_statistics` its BatchNorm uses the statistics of each batch of `batch_size` (the authors' code), not
    the running ones.
    """
    return torch.cat([images.float() for images in _batches(generator, z, batch_statistics, batch_size)])


@torch.no_grad()
def sample_pixels(generator: nn.Module, z: Tensor, *, batch_statistics: bool = False, batch_size: int = 256) -> Tensor:
    """As `sample`, but uint8 [N, 3, H, W] on the CPU: a quarter of the memory, and only a batch of it as float32."""
    batches = _batches(generator, z, batch_statistics, batch_size)
    return torch.cat([to_uint8(images).permute(0, 3, 1, 2) for images in batches]).contiguous()


def _batches(generator: nn.Module, z: Tensor, batch_statistics: bool, batch_size: int) -> Iterator[Tensor]:
    module = copy.deepcopy(generator).train(batch_statistics)
    return map(module, z.split(batch_size))


@dataclass(frozen=True)
class RunSampler:
    """The generator of a run's folder, and how it is sampled from.

    Attributes:
        saved: the generator as its file holds it.
        batch_statistics: as the run's `--sample-bn` says.
    """

    saved: SavedGenerator
    batch_statistics: bool

    @classmethod
    def load(cls, path: str | Path, *, best: bool = False) -> RunSampler:
        """The newest generator, or with `best` the one that `--evaluate-every` found closest to the real images.

        InputError that names `--run` if the folder holds no run, or a run that has no such generator.
        """
        run = RunFolder(path)
        if not run.path.is_dir():
            raise InputError(f"--run: {run.path} is not a folder")
        if not run.generator.exists():
            raise InputError(
                f"--run: {run.path} has no generator yet; train it with python -m engine.train --out {run.path}"
            )
        if best and not run.best_generator.exists():
            raise InputError(f"--best: {run.path} was not evaluated during training (--evaluate-every)")
        saved = load_generator(run.best_generator if best else run.generator)
        return cls(saved, Config.load(run.config).networks.sample_bn == "batch")

    def images(self, z: Tensor) -> Tensor:
        """Images [N, 3, H, W] of `z` [N, nz], float32, in [-1, 1]."""
        return sample(self.saved.module, z, batch_statistics=self.batch_statistics)

    def draw(self, count: int, seed: int) -> Tensor:
        """`count` images of random z; `seed` decides them."""
        return self.images(draw_z(count, self.saved.nz, seed))

    def draw_pixels(self, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
        """`count` images of random z as uint8 [count, 3, H, W], computed on `device`, a batch at a time."""
        z = draw_z(count, self.saved.nz, seed).to(device)
        return sample_pixels(self.saved.module.to(device), z, batch_statistics=self.batch_statistics)

    def draw_paths(self, count: int, steps: int, seed: int) -> Tensor:
        """`count` rows of `steps` images on the way from one random z to another, [count · steps, 3, H, W]."""
        ends = draw_z(2 * count, self.saved.nz, seed)
        return self.images(interpolate(ends[:count], ends[count:], steps))


def draw_z(count: int, nz: int, seed: int) -> Tensor:
    """z [count, nz] ~ N(0, I), from the CPU's random numbers whatever the device."""
    return torch.randn(count, nz, generator=torch.Generator().manual_seed(seed))


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Great-circle paths between rows of `start` and `end` [R, nz], as [R · steps, nz] (White 2016, section 2.1).

    A straight line between two Gaussian vectors passes through short vectors that a generator never sees; the arc
    sin((1−t)ω)/sin ω · start + sin(tω)/sin ω · end, with ω the angle between them, does not.
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=1).clamp(-1, 1)
    angle = cosine.arccos().view(-1, 1, 1).clamp(min=1e-6)
    t = torch.linspace(0, 1, steps).view(1, -1, 1)
    path = ((1 - t) * angle).sin() * start.unsqueeze(1) + (t * angle).sin() * end.unsqueeze(1)
    return (path / angle.sin()).flatten(0, 1)
