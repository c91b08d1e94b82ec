"""Real minibatches for the steps of a method: always of one shape, and in a place that a checkpoint holds.

Each image is delivered once an epoch, over all ranks together, in an order that the seed and the epoch's number decide.
A step that is captured in a CUDA graph reads images where they were at capture, so there the n-th minibatch of every
step lies in the n-th *slot*, which is filled before the step. How many a step takes is known from those before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.support.errors import InputError, reason
from pipelines import Batch, DataError, ImageLoader, ImageStream, sent
from pipelines.loading.loader import rows_of

log = logging.getLogger("gfmn")


class Source(Protocol):
    """Where the trainer has real minibatches from, in this order around every step:

        deliver()      what the step takes is put where it is read
        begin()        the step begins, and takes `batches` one by one; for a replay of its graph this is not called
        end()          what was taken is done with

    Attributes:
        batches: what `Method.step` gets.
    """

    @property
    def batches(self) -> Iterator[Batch] | None: ...

    def deliver(self) -> None: ...

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class NoImages:
    """For methods that read nothing (`Source`)."""

    batches = None

    def deliver(self) -> None:
        pass

    def begin(self) -> None:
        pass

    def end(self) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


class ImageLane:
    """The way of images to where steps read them. On a CPU they are there already."""

    def read(self, share: Callable[[], Batch]) -> Batch:
        """What `share` returns, which `arrive` has to follow."""
        return share()

    def arrive(self, images: Tensor) -> None:
        """What the device is told from now on finds `images` whole."""

    def is_capturing(self) -> bool:
        """Whether what the device is told now is recorded, not done."""
        return False


class CudaImageLane(ImageLane):
    """On a GPU images are read on a stream of their own: a loader waits for its own copies, and for no step."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def read(self, share: Callable[[], Batch]) -> Batch:
        with torch.cuda.stream(self.stream):
            return share()

    def arrive(self, images: Tensor) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        images.record_stream(current)

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


@dataclass
class _Share:
    """This rank's rows of a minibatch, whose place in the stream is `place` (`ImageStream.state_dict`).

    Without slots the step alone holds what it has taken, so that one that takes hundreds of minibatches can let go of
    them one by one; `batch` is None then.
    """

    batch: Batch | None
    place: dict[str, Tensor]


class Delivery:
    """This rank's share of one minibatch after another, without end (`Source`).

    Shares always have as many rows. Where images are bad, good ones of the same share are repeated in turn, and a share
    of bad images alone has those of the share after it; a warning says so once. (A single process passes over a
    minibatch of bad images alone.)

    Args:
        loader: shuffled, with `drop_last`; this rank's part of every batch.
        lane: to the device.
        slots: whether the n-th minibatch of every step lies in one place, as a step that is captured needs it.

    Raises:
        InputError: the data set has fewer images than a minibatch.
        DataError: while iterating, an image cannot be used (and the dataset skips none), or none of an epoch can.
    """

    def __init__(self, loader: ImageLoader, lane: ImageLane | None = None, *, slots: bool = False):
        images, size = len(loader.dataset), loader.batch_size
        if images < size:
            name = loader.dataset.name
            raise InputError("batch_size", f"{size} is more than the {images} images of {name}; give at most {images}")
        self.stream, self.lane = ImageStream(loader), ImageLane() if lane is None else lane
        rows = rows_of(size, loader.part, loader.num_parts)
        self.count = rows.stop - rows.start
        self._slots: list[Batch] | None = [] if slots else None
        # What was read and is not done with; how many of it this step has taken, and the one before took.
        self._read: list[_Share] = []
        self._taken, self._usual = 0, 0
        self._inside = self._warned = False

    @property
    def batches(self) -> Iterator[Batch]:
        """This very thing."""
        return self

    def __iter__(self) -> Delivery:
        return self

    def deliver(self) -> None:
        """Fill the slots with what a step takes. Without slots, a step reads when it asks."""
        if self._slots is not None:
            for index in range(self._usual):
                self._put(index)

    def begin(self) -> None:
        self._taken, self._inside = 0, True

    def __next__(self) -> Batch:
        """The next minibatch's share. RuntimeError if it was not foreseen, and is asked for in a capture."""
        index, slots = self._taken, self._slots
        if slots is None or index >= self._usual:
            if self.lane.is_capturing():
                raise RuntimeError("the step takes more minibatches of real images than the step before")
            self._put(index)
        self._taken += 1
        if slots is not None:
            return slots[index]
        batch, self._read[index].batch = self._read[index].batch, None
        assert batch is not None
        return batch

    def end(self) -> None:
        self._inside = False
        del self._read[: self._taken]
        self._usual = self._taken

    def _put(self, index: int) -> None:
        """Read the minibatch number `index` of a step, and with slots put it into its own."""
        while index >= len(self._read):
            self._read_on()
        batch = self._read[index].batch
        assert batch is not None
        images, indices = batch
        self.lane.arrive(images)
        if self._slots is None:
            return
        if index == len(self._slots):
            self._slots.append(Batch(torch.empty_like(images), torch.empty_like(indices)))
        self._slots[index].images.copy_(images, non_blocking=True)
        self._slots[index].indices.copy_(indices)

    def _read_on(self) -> None:
        """Read the next share, and those without a good image before it."""
        places: list[dict[str, Tensor]] = []
        loader = self.stream.loader
        for _ in range(len(loader)):
            places.append(self.stream.state_dict())
            batch = self.lane.read(self._share)
            if len(batch.indices):
                self._read += [_Share(batch, place) for place in places]
                return
        raise DataError(f"no image of {loader.dataset.name} can be used: {loader.bad_images[0]}")

    def _share(self) -> Batch:
        """The next one of the stream: whole, or empty."""
        loader = self.stream.loader
        try:
            batch = next(self.stream)
        except OSError as error:  # the trainer takes one for a file that it could not write
            raise DataError(f"{loader.dataset.name}: {reason(error)}") from error
        good = len(batch.indices)
        if good == self.count:
            return batch
        if not self._warned:
            log.warning("warning: minibatches have bad images, whose places good ones take: %s", loader.bad_images[0])
            self._warned = True
        if not good:
            return batch
        rows = torch.arange(self.count) % good
        return Batch(batch.images[sent(rows, batch.images.device)], batch.indices[rows])

    def state_dict(self) -> dict[str, Tensor]:
        """The place of the minibatch that comes next: `epoch` and `position`, int64 [], of any number of ranks."""
        ahead = self._read[self._taken if self._inside else 0 :]
        return ahead[0].place if ahead else self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; KeyError or ValueError if there is no such place."""
        self._read = []
        self.stream.load_state_dict(state)
