"""The processes of a job under `torchrun`: who is who, what they tell each other, and how one of them ends all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from engine.support.errors import InputError, Interrupted
from engine.training import rendezvous
from engine.training.rendezvous import EndedElsewhere

T = TypeVar("T")


class Mergeable(Protocol):
    """Moments of a set of images, a dataclass with further fields that all ranks share."""

    count: int
    mean: torch.Tensor
    m2: torch.Tensor

    def merge(self: M, other: M) -> M:
        """Moments of both sets."""
        ...


M = TypeVar("M", bound=Mergeable)

_POLL = 0.2
_GATHERING = timedelta(minutes=10)
_ENDING = 20.0
# A rank that another one's failure finds in a collective has so long to come out of it by itself.
_GRACE = 5.0
_KILLED = "another process of this job has ended (killed, or out of memory); start the job again to resume"


class Ranks:
    """This process among those of a job. Without `torchrun` it is the only one, and everything here does nothing.

    Ranks are chunks (docs/method.md, identity 4): a rank has its `share` of every minibatch, and with `merge`, `gather`
    and `sum_` it takes the step of a single process. Alone, each of them returns its argument.

    Messages go through the launcher's key-value store, so a rank that waits notices within a second that another one
    has failed; tensors go through one lasting process group, gloo on CPUs and NCCL on GPUs.

    Args:
        rank: from 0.
        size: number of processes.
        store: shared by all of them; None if there is one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None):
        self.rank, self.size, self.store = rank, size, store
        self._checked = 0.0
        self._group = False
        self._ended = threading.Event()

    @classmethod
    def join(cls) -> Ranks:
        """The job that `torchrun` describes in the environment, or the only process.

        InputError if the others don't come within a time that the environment may set (`engine.training.rendezvous`).
        """
        return cls(*rendezvous.join())

    def device(self, device: torch.device) -> torch.device:
        """This rank's own device where there are several; InputError if there are more processes than GPUs."""
        if device.type != "cuda" or self.size == 1:
            return device
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        if local >= torch.cuda.device_count():
            raise InputError("device", f"process {local} of this machine has no GPU of its own; start fewer processes")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def first(self, name: str, make: Callable[[], T]) -> T:
        """`make()` on rank 0 and then on the others, which find in the caches what rank 0 left there."""
        if self.rank > 0:
            self._await([name])
        result = make()
        if self.rank == 0 and self.store is not None:
            self.store.set(name, "")
        return result

    def meet(self, name: str, message: Any, give_up: Callable[[], bool] = lambda: False) -> list[Any]:
        """Wait for all ranks; returns the messages of all (what JSON can hold), in rank order.

        Waits for as long as it takes: until another rank fails (EndedElsewhere), or `give_up()` (KeyboardInterrupt).
        """
        if self.store is None:
            return [message]
        self.store.set(f"{name} {self.rank}", json.dumps(message))
        keys = [f"{name} {rank}" for rank in range(self.size)]
        self._await(keys, give_up)
        return [json.loads(self.store.get(key)) for key in keys]

    def to_first(self, state: Mapping[str, torch.Tensor]) -> list[Mapping[str, torch.Tensor]]:
        """On rank 0 everybody's `state` (of the same names, of any shapes) in rank order, elsewhere one's own alone."""
        if self.store is None:
            return [state]
        shapes = self.meet("shapes", {name: list(tensor.shape) for name, tensor in state.items()})
        state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        self._open()
        states: list[Mapping[str, torch.Tensor]] = [state]
        for rank in range(1, self.size):
            received = {}
            for name, own in state.items():
                if self.rank == rank:
                    dist.send(own, dst=0)
                elif self.rank == 0:
                    received[name] = own.new_empty(shapes[rank][name])
                    dist.recv(received[name], src=rank)
            if self.rank == 0:
                states.append(received)
        return states

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """A copy of what belongs to a job (a generator to sample from, say) is this process's alone."""
        return ALONE

    def share(self, count: int) -> slice:
        """Which of `count` images are this rank's: as even as can be, in rank order."""
        least, more = divmod(count, self.size)
        start = self.rank * least + min(self.rank, more)
        return slice(start, start + least + (self.rank < more))

    def counts(self, own: int) -> list[int]:
        """Everybody's number, in rank order. A message between CPUs: the device is not waited for."""
        if self.store is None:
            return [own]
        return self._everybody(torch.tensor([own])).flatten().tolist()

    def merge(self, moments: M) -> M:
        """Moments of the images of all ranks, of each rank's own; the same bits on all of them.

        Every rank gets mean and M2 of all, 2·D numbers of each, and merges them in rank order.
        """
        if self.store is None:
            return moments
        counts = self.counts(moments.count)
        everybody = self._everybody(torch.cat((moments.mean, moments.m2)))
        parts = [
            dataclasses.replace(moments, count=count, mean=mean, m2=m2)  # type: ignore[type-var]
            for count, (mean, m2) in zip(counts, everybody.unflatten(1, (2, -1)).unbind(), strict=True)
            if count
        ]
        return functools.reduce(lambda merged, part: merged.merge(part), parts)

    def gather(self, features: torch.Tensor) -> tuple[torch.Tensor, slice]:
        """Everybody's rows of `features` [n, F] in rank order, and which of them are this rank's."""
        if self.store is None:
            return features, slice(0, len(features))
        counts = self.counts(len(features))
        most, start = max(counts), sum(counts[: self.rank])
        padded = features.new_zeros(most, *features.shape[1:])
        padded[: len(features)] = features
        rows = torch.cat([part[:count] for part, count in zip(self._everybody(padded), counts, strict=True)])
        return rows, slice(start, start + len(features))

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """In place, every tensor becomes its sum over all ranks; the same bits on all of them, in one exchange."""
        if self.store is None or not tensors:
            return
        self._open()
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._together():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])

    def _everybody(self, own: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor of one shape, [W, *shape]."""
        self._open()
        flat = own.new_empty(self.size * own.numel())
        with self._together():
            dist.all_gather_single(flat, own.flatten())
        return flat.view(self.size, *own.shape)

    def _open(self) -> None:
        """Join the lasting group, once."""
        if self._group:
            return
        store = dist.PrefixStore("tensors", self.store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_GATHERING)
        self._group = True

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """A collective that another rank doesn't come to: that one has failed, which it says, or was killed."""
        try:
            yield
        except RuntimeError:
            time.sleep(_POLL)  # let it say so
            with contextlib.suppress(RuntimeError):
                self._raise_failure()
            raise InputError("", _KILLED) from None

    def watch(self) -> None:
        """From now on a thread ends this process if another rank fails and this one waits for it in a collective."""
        if self.store is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(5 * _POLL):
            try:
                failed = self.store.add("failures", 0) > 0
            except RuntimeError:  # the launcher has gone
                failed = True
            if failed:
                if not self._ended.wait(_GRACE):
                    os._exit(2)
                return

    def close(self) -> None:
        """Leave the group."""
        self._ended.set()
        if self._group:
            dist.destroy_process_group()
            self._group = False

    def check(self) -> None:
        """EndedElsewhere if another rank has failed. Asks at most once in a second."""
        now = time.monotonic()
        if self.store is not None and now >= self._checked + 1:
            self._checked = now
            self._raise_failure()

    def fail(self) -> bool:
        """Tell the others that this rank has failed, and let them come to an end. Whether it was the first to fail."""
        if self.store is None:
            return True
        self._ended.set()
        try:
            first = self.store.add("failures", 1) == 1
            if not torch.cuda.is_available():
                self.close()  # what others wait for won't come, and with gloo they see that
            self._leave()
        except RuntimeError:  # the launcher, and with it the store, has gone
            return True
        return first

    def leave(self) -> None:
        """End together with the others, so that the launcher sees no straggler; waits a few seconds at most."""
        self._ended.set()
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self._leave()
        self.close()

    def _leave(self) -> None:
        self.store.add("ended", 1)
        end = time.monotonic() + _ENDING
        while self.store.add("ended", 0) < self.size and time.monotonic() < end:
            time.sleep(_POLL / 4)
        # The store may live in rank 0's process.
        if self.rank == 0:
            time.sleep(_POLL)

    def _await(self, keys: Sequence[str], give_up: Callable[[], bool] = lambda: False) -> None:
        while not self._there(keys):
            if give_up():
                raise KeyboardInterrupt
            time.sleep(_POLL)

    def _there(self, keys: Sequence[str]) -> bool:
        """Whether the store has all of `keys`; what is raised instead if another rank has failed or was killed."""
        try:
            if self.store.check(list(keys)):
                return True
            self._raise_failure()
        except RuntimeError:  # whoever serves the store has gone
            raise InputError("", _KILLED) from None
        return False

    def _raise_failure(self) -> None:
        if self.store.add("failures", 0):
            raise EndedElsewhere


ALONE = Ranks()


@contextlib.contextmanager
def job() -> Iterator[Ranks]:
    """This process's place among those of a job that stops in agreement. An error in one ends all, and one tells it."""
    try:
        ranks = Ranks.join()
    except EndedElsewhere:
        sys.exit(2)
    try:
        yield ranks
    except EndedElsewhere:
        ranks.leave()
        sys.exit(2)
    except Interrupted as interruption:
        ranks.leave()
        if ranks.rank == 0:
            raise
        sys.exit(interruption.status)
    except BaseException as error:
        if ranks.fail():
            raise
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    else:
        ranks.leave()
    finally:
        ranks.close()
