"""The processes of a job under `torchrun`: who is who, and how one of them ends all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine.support.errors import InputError

T = TypeVar("T")

_POLL = 0.2
_GATHERING = timedelta(minutes=10)
_ENDING = 20.0


class EndedElsewhere(Exception):
    """Another process of this job has failed, and says why; this process exits silently."""


class Ranks:
    """This process among those of a job. Without `torchrun` it is the only one, and everything here does nothing.

    Ranks talk through the launcher's key-value store, so a rank that waits notices within a second that another one
    has failed; the process group (gloo, on the CPU) only carries tensors.

    Args:
        rank: from 0.
        size: number of processes.
        store: shared by all of them; None if there is one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None):
        self.rank, self.size, self.store = rank, size, store
        self._checked = 0.0

    @classmethod
    def join(cls) -> Ranks:
        """The job that `torchrun` describes in the environment, or the only process."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        store, rank, size = next(iter(dist.rendezvous("env://")))
        return cls(rank, size, store)

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
        store = dist.PrefixStore("tensors", self.store)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=_GATHERING)
        try:
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
        finally:
            dist.destroy_process_group()

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
        try:
            first = self.store.add("failures", 1) == 1
            self._leave()
        except RuntimeError:  # the launcher, and with it the store, has gone
            return True
        return first

    def leave(self) -> None:
        """End together with the others, so that the launcher sees no straggler; waits a few seconds at most."""
        if self.store is not None:
            try:
                self._leave()
            except RuntimeError:
                return

    def _leave(self) -> None:
        self.store.add("ended", 1)
        end = time.monotonic() + _ENDING
        while self.store.add("ended", 0) < self.size and time.monotonic() < end:
            time.sleep(_POLL / 4)
        # The store may live in rank 0's process.
        if self.rank == 0:
            time.sleep(_POLL)

    def _await(self, keys: Sequence[str], give_up: Callable[[], bool] = lambda: False) -> None:
        while not self.store.check(list(keys)):
            self._raise_failure()
            if give_up():
                raise KeyboardInterrupt
            time.sleep(_POLL)

    def _raise_failure(self) -> None:
        if self.store.add("failures", 0):
            raise EndedElsewhere


ALONE = Ranks()
