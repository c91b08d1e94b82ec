"""The processes of a job under `torchrun`: who is who, what they tell each other, and how one of them ends all."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine.support.errors import InputError, Interrupted, one_line
from engine.training import rendezvous
from engine.training.arriving import Arriving, M, Merging
from engine.training.lifeline import FAILURES, KILLED, LOST, Lifeline, end_with_others, served, unreached
from engine.training.rendezvous import EndedElsewhere

T = TypeVar("T")

_POLL = 0.2
_GATHERING = timedelta(minutes=10)
_ENDING = 20.0
_INTERRUPTED = "interrupted"


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
        self._named: Counter[str] = Counter()
        self._group = False
        self._ended = threading.Event()
        self._left = False
        self._lifeline: Lifeline | None = None
        # The counts of one step that is taken for a capture, and what of them the capture has not asked for yet.
        self._told: list[tuple[int, list[int]]] | None = None
        self._rehearsed: list[tuple[int, list[int]]] = []
        self._known: Iterator[tuple[int, list[int]]] | None = None

    @classmethod
    def join(cls) -> Ranks:
        """The job that `torchrun` describes in the environment, or the only process.

        InputError if the others don't come within a time that the environment may set (`engine.training.rendezvous`).
        """
        ranks = cls(*rendezvous.join())
        with served():
            ranks._lifeline = Lifeline.of(ranks.rank, ranks.size, ranks.store)
        return ranks

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
        name = self._once(name)
        if self.rank > 0:
            self._await([name])
        result = make()
        if self.rank == 0 and self.store is not None:
            with served():
                self.store.set(name, "")
        return result

    def meet(self, name: str, message: Any, give_up: Callable[[], bool] = lambda: False) -> list[Any]:
        """Wait for all ranks; returns the messages of all (what JSON can hold), in rank order.

        Waits for as long as it takes: until another rank fails (EndedElsewhere) or was told to stop (Interrupted), or
        until `give_up()` (KeyboardInterrupt).
        """
        if self.store is None:
            return [message]
        name = self._once(name)
        keys = [f"{name} {rank}" for rank in range(self.size)]
        with served():
            self.store.set(keys[self.rank], json.dumps(message))
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
        with self._together():
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

    def copy_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """In place, every tensor becomes that of rank 0, of the same shape."""
        if self.store is None:
            return
        self._open()
        with torch.no_grad(), self._together():
            for tensor in tensors:
                flat = tensor.flatten()
                dist.broadcast(flat, src=0)
                tensor.copy_(flat.view_as(tensor))

    def from_first(self, data: bytes) -> bytes:
        """Rank 0's `data` on every rank; the others' is of no interest. Waits for all ranks, as long as it takes."""
        if self.store is None:
            return data
        size, *_ = self.meet("bytes", len(data))
        own = torch.empty(size, dtype=torch.uint8)
        if self.rank == 0:
            own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else own
        self.copy_first([own])
        return own.numpy().tobytes()

    def _once(self, name: str) -> str:
        """A key of its own each time: what an earlier exchange of this name left is not taken for a new one."""
        self._named[name] += 1
        return f"{name} {self._named[name]}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """A copy of what belongs to a job (a generator to sample from, say) is this process's alone."""
        return ALONE

    def share(self, count: int, unit: int = 1) -> slice:
        """Which of `count` images are this rank's: as even as can be, in rank order.

        Args:
            unit: so many consecutive images stay together; the last ones may be fewer.
        """
        least, more = divmod(-(-count // unit), self.size)
        start = self.rank * least + min(self.rank, more)
        end = start + least + (self.rank < more)
        return slice(min(start * unit, count), min(end * unit, count))

    def counts(self, own: int) -> list[int]:
        """Everybody's number, in rank order. A message between CPUs: the device is not waited for."""
        return self.counting(own)()

    def counting(self, own: int) -> Callable[[], list[int]]:
        """Begin to tell each other a number; the function returned waits for everybody's, in rank order."""
        if self.store is None:
            return lambda: [own]
        if self._known is not None:
            told, counts = next(self._known, (None, []))
            if told != own:
                raise RuntimeError(f"a step for a capture told {told}, and the captured one tells {own}")
            return lambda: counts
        arriving = self._gathering(torch.tensor([own]))
        found: list[int] = []
        if self._told is not None:
            self._told.append((own, found))

        def wait() -> list[int]:
            found[:] = arriving.wait().flatten().tolist()
            return found

        return wait

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so. The host waits for the others."""
        return any(self.counts(int(flag)))

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """A step that is taken as one that will be captured, which tells the same counts again."""
        self._told = []
        try:
            yield
        finally:
            self._rehearsed, self._told = self._told, None

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """A step that is captured, so that its Python never runs again: CPUs exchange nothing.

        Every rank has the same share of every minibatch, so the counts are those of the last rehearsal.
        """
        self._known = iter(self._rehearsed)
        try:
            yield
        finally:
            self._known = None

    def merging(self, count: int) -> Merging[Any]:
        """Begin to merge the moments of all ranks, of which this one's are of `count` images: see `Merging`."""
        return Merging(self.counting(count), None if self.store is None else self._gathering)

    def merge(self, moments: M) -> M:
        """Moments of the images of all ranks, of each rank's own; the same bits on all of them."""
        if self.store is None:
            return moments
        merging: Merging[M] = self.merging(moments.count)
        merging.start(moments)
        (merged,) = merging.wait()
        return merged

    def gather(
        self, features: torch.Tensor, counts: Callable[[], list[int]] | None = None
    ) -> tuple[torch.Tensor, slice]:
        """Everybody's rows of `features` [n, F] in rank order, and which of them are this rank's.

        Args:
            counts: what `counting(n)` returned earlier, if it was called.
        """
        if self.store is None:
            return features, slice(0, len(features))
        rows_of = (counts or self.counting(len(features)))()
        most, start = max(rows_of), sum(rows_of[: self.rank])
        padded = features.new_zeros(most, *features.shape[1:])
        padded[: len(features)] = features
        everybody = self._gathering(padded).wait()
        rows = torch.cat([part[:count] for part, count in zip(everybody, rows_of, strict=True)])
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

    def _gathering(self, own: torch.Tensor) -> Arriving:
        """Begin to get every rank's tensor of one shape."""
        self._open()
        return Arriving(own, self.size, self._together)

    def _open(self) -> None:
        """Join the lasting group, once."""
        if self._group:
            return
        store = dist.PrefixStore("tensors", self.store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # NCCL may register the buffers of captured collectives with the other ranks, inside the capture. There a rank
        # whose capture has failed would be waited for.
        if torch.cuda.is_available():
            os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        connected = threading.Event()
        try:
            self._end_with_others(connected)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_GATHERING)
        except RuntimeError as error:
            with served():
                self._raise_failure()
            why = f"process {self.rank} of {self.size} cannot connect to the others ({one_line(error)})"
            raise InputError("", f"{why}; start the job again to resume") from None
        finally:
            connected.set()
        self._group = True

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """A collective that another rank doesn't come to: that one has failed, which it says, or was killed."""
        try:
            yield
        except RuntimeError as error:
            if self._known is not None:
                raise  # what cannot be captured; nobody has been waited for
            time.sleep(_POLL)  # let it say so
            with contextlib.suppress(RuntimeError):
                self._raise_failure()
            raise unreached(error) from None

    def watch(self) -> None:
        """From now on a thread ends this process if another rank fails and this one waits for it in a collective."""
        if self.store is not None:
            self._end_with_others(self._ended)

    def _end_with_others(self, until: threading.Event) -> None:
        threading.Thread(target=end_with_others, args=(self.store, until, self._leave), daemon=True).start()

    def close(self) -> None:
        """Leave the group."""
        self._ended.set()
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None
        if self._group:
            dist.destroy_process_group()
            self._group = False

    def check(self) -> None:
        """EndedElsewhere if another rank has failed, Interrupted if it was told to stop. Asks once in a second."""
        now = time.monotonic()
        if self.store is not None and now >= self._checked + 1:
            self._checked = now
            with served():
                self._raise_failure()

    def fail(self) -> bool:
        """Tell the others that this rank has failed, and let them come to an end. Whether it was the first to fail."""
        if self.store is None:
            return True
        self._ended.set()
        try:
            first = self.store.add(FAILURES, 1) == 1
            if not torch.cuda.is_available():
                self.close()  # what others wait for won't come, and with gloo they see that
            self._leave(self.store)
        except RuntimeError:  # the launcher, and with it the store, has gone
            return True
        return first

    def leave(self, status: int = 0) -> None:
        """End together with the others, so that the launcher sees no straggler; waits a few seconds at most.

        Args:
            status: of a process that was told to stop: others that wait for it, or `check`, are Interrupted as well.
        """
        self._ended.set()
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                if status:
                    self.store.set(_INTERRUPTED, str(status))
                self._leave(self.store)
        self.close()

    def _leave(self, store: Any) -> None:
        if not self._left:
            self._left = True
            store.add("ended", 1)
        end = time.monotonic() + _ENDING
        while store.add("ended", 0) + store.add(LOST, 0) < self.size and time.monotonic() < end:
            time.sleep(_POLL / 4)
        # The store may live in rank 0's process.
        if self.rank == 0:
            time.sleep(_POLL)

    def _await(self, keys: Sequence[str], give_up: Callable[[], bool] = lambda: False) -> None:
        with served():
            while not self._there(keys):
                if give_up():
                    raise KeyboardInterrupt
                time.sleep(_POLL)

    def _there(self, keys: Sequence[str]) -> bool:
        """Whether the store has all of `keys`; what is raised instead if one of them will never come."""
        ended = self.store.add("ended", 0)  # asked first: all that those had to say is there
        if self.store.check(list(keys)):
            return True
        self._raise_failure()
        if ended:
            raise InputError("", "another process of this job has come to its end, and this one waits for it")
        return False

    def _raise_failure(self) -> None:
        if self.store.add(FAILURES, 0):
            raise EndedElsewhere
        if self.store.check([_INTERRUPTED]):
            raise Interrupted("another process of this job was told to stop", int(self.store.get(_INTERRUPTED)))
        if self.store.add(LOST, 0):
            raise InputError("", KILLED)


ALONE = Ranks()
