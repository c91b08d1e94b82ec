"""Priors: the laws that z is drawn from, and the stream of them that a training run consumes.

Some have numbers of their own, which a method learns: `engine.generation.learnt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.support.errors import InputError

MAX_NZ = 2**16
"""The longest z: a generator's first layer alone has 2 GiB of weights then."""
_NO_ARC = 1e-3  # of sin ω: float32's cosine tells no angles that are nearer to 0 or π


class Prior(Protocol):
    """A law of z.

    Attributes:
        name: as in `PRIORS` or `engine.generation.learnt`, and in the file of a saved generator.
        nz: length of z.
    """

    @property
    def name(self) -> str:
        """As in `PRIORS`, or as in `engine.generation.learnt`."""
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

    def draw_ends(self, count: int, seed: int) -> Tensor:
        """What `between` leads from and to, [count, K] on the CPU; `seed` decides it."""
        ...

    def between(self, start: Tensor, end: Tensor, steps: int) -> Tensor:
        """z on the way from each row of `start` to that of `end` [R, K], as [R · steps, nz]; all are likely ones."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The numbers that the law has besides its name and nz: saved with the generator."""
        ...


class _Plain:
    """A law without numbers of its own, and z itself for the ends of a path; a path is an arc."""

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """The next z of `random`."""
        raise NotImplementedError

    def draw(self, count: int, seed: int) -> Tensor:
        """z [count, nz]; `seed` decides it."""
        return self.sample(count, torch.Generator().manual_seed(seed))

    def draw_ends(self, count: int, seed: int) -> Tensor:
        """z, as `draw` has it."""
        return self.draw(count, seed)

    def between(self, start: Tensor, end: Tensor, steps: int) -> Tensor:
        """See `interpolate`."""
        return interpolate(start, end, steps)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Gaussian(_Plain):
    """z ~ N(0, I), the paper's."""

    nz: int
    name: str = "gaussian"

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """The next z of `random`."""
        return torch.randn(count, self.nz, generator=random)


@dataclass(frozen=True)
class Uniform(_Plain):
    """z uniform in [-1, 1], as in generative moment matching networks (Li et al. 2015). A path is straight."""

    nz: int
    name: str = "uniform"

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """The next z of `random`."""
        return torch.rand(count, self.nz, generator=random) * 2 - 1

    def between(self, start: Tensor, end: Tensor, steps: int) -> Tensor:
        """The straight line: an arc would leave the cube."""
        return straight(start, end, steps)


@dataclass(frozen=True)
class Ball(_Plain):
    """z uniform in the ball of `radius` around 0 (Bojanowski et al. 2018, section 2, have codes in the unit ball).

    The first nz coordinates of a point that is uniform on the sphere in nz + 2 dimensions, which Gaussian numbers
    divided by their norm are (Barthe et al. 2005, corollary 4). A path between two z is straight.

    Raises:
        InputError: "radius" is not a positive number.
    """

    nz: int
    radius: float = 1.0
    name: str = "ball"

    def __post_init__(self) -> None:
        check_radius(self.radius)

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """The next z of `random`."""
        x = torch.randn(count, self.nz + 2, generator=random)
        return self.radius * x[:, : self.nz] / x.norm(dim=1, keepdim=True)

    def between(self, start: Tensor, end: Tensor, steps: int) -> Tensor:
        """Straight lines: a ball is convex."""
        return straight(start, end, steps)

    def state_dict(self) -> dict[str, Tensor]:
        """The `radius`, float64 []."""
        return {"radius": torch.tensor(self.radius, dtype=torch.float64)}


def check_radius(radius: float) -> None:
    """InputError unless a ball may have this radius."""
    if not 0 < radius < float("inf"):
        raise InputError("radius", f"must be positive and finite, got {radius:g}")


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Great-circle paths between rows of `start` and `end` [R, nz], as [R · steps, nz] (White 2016, section 2.1).

    A straight line between two Gaussian vectors passes through short vectors that a generator never sees; the arc
    sin((1−t)ω)/sin ω · start + sin(tω)/sin ω · end, with ω the angle between them, does not. Where both point the same
    way, or opposite ways as half of all pairs with nz = 1 do, there is no one arc, and the line is taken.
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=1).clamp(-1, 1)
    angle = cosine.arccos().view(-1, 1, 1)
    t = torch.linspace(0, 1, steps, device=start.device).view(1, -1, 1)
    path = ((1 - t) * angle).sin() * start.unsqueeze(1) + (t * angle).sin() * end.unsqueeze(1)
    line = straight(start, end, steps).view_as(path)
    return torch.where(angle.sin() < _NO_ARC, line, path / angle.sin()).flatten(0, 1)


def straight(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Straight lines between rows of `start` and `end` [R, nz], as [R · steps, nz]."""
    t = torch.linspace(0, 1, steps, device=start.device).view(1, -1, 1)
    return ((1 - t) * start.unsqueeze(1) + t * end.unsqueeze(1)).flatten(0, 1)


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


PRIORS: dict[str, Callable[[int], Prior]] = {"gaussian": Gaussian, "uniform": Uniform, "ball": Ball}
"""The laws that need nothing but nz."""


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
