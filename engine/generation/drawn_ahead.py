"""The random numbers of a training run on a GPU: drawn while the device works, and read at addresses that stay.

A step on a GPU should neither wait for the CPU that draws its z (3 ms for 4,096 × 100) nor for a copy from pageable
memory. And a step that is captured in a CUDA graph reads z where it was at capture. So the next step's z is drawn
ahead into page-locked memory, and copied before that step into a tensor that every step reads: a *slot*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.generation.priors import Noise, Prior

_RING = 2
"""Page-locked buffers of a slot. With one, drawing would wait for the copy that a step in progress holds up."""


class Lane(Protocol):
    """The way from the CPU to a device: all that `DrawnAhead` asks of it."""

    device: torch.device

    def buffer(self, z: Tensor) -> Tensor:
        """Room for what is shaped as `z`, in memory that the device can copy from by itself."""
        ...

    def slot(self, z: Tensor) -> Tensor:
        """The same on the device."""
        ...

    def copy(self, slot: Tensor, buffer: Tensor) -> Any:
        """Let the device copy, after all that it has been told before; returns what `wait` takes."""
        ...

    def wait(self, copied: Any) -> None:
        """Until the device has made that copy."""
        ...

    def is_capturing(self) -> bool:
        """Whether what the device is told now is recorded, not done."""
        ...


class CudaLane:
    """Page-locked memory, copies that nothing waits for, and events (`Lane`)."""

    def __init__(self, device: torch.device):
        self.device = device

    def buffer(self, z: Tensor) -> Tensor:
        return torch.empty_like(z, pin_memory=True)

    def slot(self, z: Tensor) -> Tensor:
        return torch.empty_like(z, device=self.device)

    def copy(self, slot: Tensor, buffer: Tensor) -> torch.cuda.Event:
        slot.copy_(buffer, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        return copied

    def wait(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


class _Place:
    """Where the n-th z of a step goes: its slot on the device, and a ring of buffers that are copied from."""

    def __init__(self, lane: Lane, z: Tensor):
        self.lane, self.slot = lane, lane.slot(z)
        self._buffers = [lane.buffer(z) for _ in range(_RING)]
        self._copied: list[Any] = [None] * _RING
        self._turn = 0

    def fits(self, z: Tensor) -> bool:
        return self.slot.shape == z.shape and self.slot.dtype == z.dtype

    def fill(self, z: Tensor) -> None:
        """Put `z` into the next buffer, once the device has copied what is in it."""
        self._turn = (self._turn + 1) % _RING
        if self._copied[self._turn] is not None:
            self.lane.wait(self._copied[self._turn])
        self._buffers[self._turn].copy_(z)

    def deliver(self) -> None:
        """Let the device copy that buffer into the slot."""
        self._copied[self._turn] = self.lane.copy(self.slot, self._buffers[self._turn])


@dataclass(frozen=True)
class _Drawn:
    """One z that was drawn: for which request, and the random stream's state before."""

    prior: Prior
    count: int
    before: Tensor


class DrawnAhead(Noise):
    """`Noise` whose z lie in slots: the n-th `draw` of every step returns the same tensor, with other numbers.

    What a step asked for, the next one is expected to ask for as well, and is drawn ahead. If it asks for something
    else, the stream is rewound and drawn again: the numbers are those of `Noise`, whatever happens. The order is

        deliver()        the device copies what was drawn ahead into the slots
        begin(), draw()  …the step, or the replay of its graph, for which neither is called…
        draw_ahead()     the CPU draws the next step's z while the device works

    `state_dict` is the stream's state before what was drawn ahead.

    Args:
        seed: of the stream.
        lane: to the device.
    """

    def __init__(self, seed: int, lane: Lane):
        super().__init__(seed, lane.device)
        self.lane = lane
        self._places: list[_Place] = []
        # What the last step asked for, and what of that has been drawn for the next one.
        self._requests: list[tuple[Prior, int]] = []
        self._drawn: list[_Drawn] = []
        # How many of `_drawn` the step has asked for. A replayed step asks for what it asked for at its capture.
        self._asked = 0
        self._inside = False

    def deliver(self) -> None:
        self._foresee()
        for _, place in zip(self._drawn, self._places):
            place.deliver()

    def begin(self) -> None:
        self._asked, self._inside = 0, True

    def draw(self, prior: Prior, count: int) -> Tensor:
        """The next z [count, nz] of `prior`, on the device: until the next step, in a slot.

        Outside of a step it is a tensor of its own. RuntimeError if it was not foreseen, and is asked for in a capture.
        """
        if not self._inside:
            self._rewind(0)
            return super().draw(prior, count)
        index, self._asked = self._asked, self._asked + 1
        if index < len(self._drawn):
            foreseen = self._drawn[index]
            if foreseen.prior is prior and foreseen.count == count:
                return self._places[index].slot
        if self.lane.is_capturing():
            raise RuntimeError("the step asks for other random numbers than the step before")
        self._rewind(index)
        self._draw(index, prior, count)
        self._places[index].deliver()
        return self._places[index].slot

    def draw_ahead(self) -> None:
        self._inside = False
        self._rewind(self._asked)
        self._requests = [(drawn.prior, drawn.count) for drawn in self._drawn]
        self._drawn = []
        self._foresee()

    def _foresee(self) -> None:
        for index in range(len(self._drawn), len(self._requests)):
            self._draw(index, *self._requests[index])

    def _draw(self, index: int, prior: Prior, count: int) -> None:
        self._drawn.append(_Drawn(prior, count, self.random.get_state()))
        z = prior.sample(count, self.random)
        if index == len(self._places):
            self._places.append(_Place(self.lane, z))
        elif not self._places[index].fits(z):
            self._places[index] = _Place(self.lane, z)
        self._places[index].fill(z)

    def _rewind(self, index: int) -> None:
        """Forget what was drawn from the request `index` on: the stream gives it again."""
        if index < len(self._drawn):
            self.random.set_state(self._drawn[index].before)
            del self._drawn[index:]

    def state_dict(self) -> dict[str, Tensor]:
        ahead = self._drawn[self._asked if self._inside else 0 :]
        return {"z": ahead[0].before if ahead else self.random.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; what was drawn ahead is forgotten."""
        self._drawn = []
        super().load_state_dict(state)
