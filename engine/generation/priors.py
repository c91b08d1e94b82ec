"""Priors: the laws that z is drawn from, and the stream of them that a training run consumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.support.errors import InputError

MAX_NZ = 2**16
"""The longest z: a generator's first layer alone has 2 GiB of weights then."""


class Prior(Protocol):
    """A law of z.

    Attributes:
        name: as in `PRIORS`, and in the file of a saved generator.
        nz: length of z.
    """

    @property
    def name(self) -> str:
        """As in `PRIORS`."""
        ...

    @property
    def nz(self) -> int:
        """Length of z."""
        ...

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """The next z [count, nz] of the stream `random`, on the CPU."""
        ...

    def draw(self, count: int, seed: int) -> Tensor:
        """z [count, nz] on the CPU, whatever the device of the run; `seed` decides it."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """z ~ N(0, I), the paper's."""

    nz: int
    name: str = "gaussian"

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """The next z of `random`."""
        return torch.randn(count, self.nz, generator=random)

    def draw(self, count: int, seed: int) -> Tensor:
        return self.sample(count, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Uniform:
    """z uniform in [-1, 1], as in generative moment matching networks (Li et al. 2015)."""

    nz: int
    name: str = "uniform"

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """The next z of `random`."""
        return torch.rand(count, self.nz, generator=random) * 2 - 1

    def draw(self, count: int, seed: int) -> Tensor:
        return self.sample(count, torch.Generator().manual_seed(seed))


def draw_batches(prior: Prior, count: int, seed: int, size: int) -> Iterator[Tensor]:
    """The rows of `prior.draw(count, seed)`, `size` of them at a time and never all in memory.

    `size` · nz is a multiple of 16: torch.randn makes 16 numbers at a time, and the last 16 of a tensor once more. So
    the last two batches are drawn as one, which has at least 16.
    """
    random = torch.Generator().manual_seed(seed)
    while count > 0:
        rows = size if count >= 2 * size else count
        yield from prior.sample(rows, random).split(size)
        count -= rows


PRIORS: dict[str, Callable[[int], Prior]] = {"gaussian": Gaussian, "uniform": Uniform}


def check_nz(nz: int) -> None:
    """InputError unless z may have `nz` dimensions: 1 to `MAX_NZ`."""
    if not 1 <= nz <= MAX_NZ:
        raise InputError("nz", f"must be from 1 to {MAX_NZ}, got {nz}")


def make_prior(name: str, nz: int) -> Prior:
    """The prior `name` of z with `nz` dimensions; InputError if it is unknown, or `check_nz` refuses nz."""
    if name not in PRIORS:
        raise InputError("prior", f"{name!r} is not known; choose one of {', '.join(PRIORS)}")
    check_nz(nz)
    return PRIORS[name](nz)


class Noise:
    """The random numbers of a training run: one stream on the CPU, the same on every device.

    Whoever takes steps calls `deliver` before each, `begin` at its beginning and `draw_ahead` after it. Nothing happens
    then here, but in `engine.generation.drawn_ahead`.

    Args:
        seed: of the stream.
        device: where z is wanted.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        self.random = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)

    def deliver(self) -> None:
        """Before a step: let the device have what was drawn ahead."""

    def begin(self) -> None:
        """A step begins, and asks for its first z next; it may begin anew after an error."""

    def draw(self, prior: Prior, count: int) -> Tensor:
        """The next z [count, nz] of `prior`, on the device."""
        return prior.sample(count, self.random).to(self.device, non_blocking=True)

    def draw_ahead(self) -> None:
        """After a step: draw what the next one will ask for."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"z": self.random.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.random.set_state(state["z"])
