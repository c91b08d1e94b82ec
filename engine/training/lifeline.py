"""Whether the processes of a job are alive, where no launcher ends all when one of them was killed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from engine.support.errors import InputError, one_line

LOST = "lost"
"""The key under which the store counts processes that have ended without a farewell."""
KILLED = "another process of this job has ended (killed, or out of memory); start the job again to resume"
FAILURES = "failures"
"""The key under which it counts processes that have failed, of which the first says why."""
# How gloo and NCCL say that another process has gone; what else they say is shown.
_GONE = re.compile("closed by peer|reset by peer|broken pipe|connection refused|remote process exited", re.IGNORECASE)
_CAUSE = "Last error:"  # after it, in lines of its own, stands what happened to NCCL
# A process that another one's failure finds in a collective has so long to come out of it by itself.
_GRACE = 5.0
_FAREWELL = b"."
_UNREACHED = "lifelines that did not reach"
_POLL = 0.2
_REACH = 10.0


class Lifeline:
    """A connection from every process to rank 0, which also serves the store; nothing is sent but a farewell.

    However a process ends, the system closes its connections, and rank 0 tells the others. Nothing has to be sent now
    and then, so one that is busy or stopped is not taken for dead. Rank 0's own end is that of the store. Under a
    launcher there is no lifeline: it ends all itself, and rank 0 need not be where the store is. A rank that a firewall
    keeps from rank 0 has none either, and says so; one that neither connects nor says so was killed after it joined.

    Args:
        rank, size, store: see `engine.training.ranks.Ranks`.
    """

    def __init__(self, rank: int, size: int, store: Any):
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._own: socket.socket | None = None
        if rank == 0:
            server = socket.create_server(("", 0))
            word = secrets.token_hex(16)
            store.set("lifeline", f"{server.getsockname()[1]} {word}")
            # A thread has a store of its own: operations of one wait for each other, also for one that waits for a key.
            heard = (server, word.encode(), store.clone(), size - 1)
            self._thread = threading.Thread(target=self._listen, args=heard, daemon=True)
            self._thread.start()
            return
        port, word = store.get("lifeline").decode().split()
        try:
            self._own = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=_REACH)
            self._own.sendall(word.encode())
        except OSError:
            store.add(_UNREACHED, 1)

    @classmethod
    def of(cls, rank: int, size: int, store: Any) -> Lifeline | None:
        """That of a job; None for a single process, and under a launcher."""
        launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        return None if store is None or launched else cls(rank, size, store)

    def _listen(self, server: socket.socket, word: bytes, store: Any, others: int) -> None:
        missing, limit = others, time.monotonic() + 2 * _REACH
        with contextlib.ExitStack() as opened, selectors.DefaultSelector() as known, server:
            known.register(server, selectors.EVENT_READ)
            while not self._ended.is_set():
                for key, _ in known.select(_POLL):
                    if key.fileobj is server:
                        other = opened.enter_context(server.accept()[0])
                        known.register(other, selectors.EVENT_READ, data=bytearray())
                        missing -= 1
                    elif self._closed(key):
                        known.unregister(key.fileobj)
                        if key.data == word:
                            self._lost(store)
                if missing > 0 and time.monotonic() > limit:
                    with contextlib.suppress(RuntimeError):
                        missing -= store.add(_UNREACHED, 0)
                    if missing > 0:
                        self._lost(store)
                    missing = 0

    @staticmethod
    def _lost(store: Any) -> None:
        with contextlib.suppress(RuntimeError):  # it has gone itself
            store.add(LOST, 1)

    @staticmethod
    def _closed(key: selectors.SelectorKey) -> bool:
        """Keep what came in the key's data; whether nothing will come any more."""
        assert isinstance(key.fileobj, socket.socket)
        try:
            came = key.fileobj.recv(64)
        except OSError:
            came = b""
        key.data.extend(came[: 64 - len(key.data)])
        return not came

    def close(self) -> None:
        """The farewell of a process that is about to end, and has said why where that is of interest."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._own is not None:
            with contextlib.suppress(OSError):
                self._own.sendall(_FAREWELL)
            self._own.close()


@contextlib.contextmanager
def served() -> Iterator[None]:
    """Inside the store is asked. InputError if it has gone, with the process that served it."""
    try:
        yield
    except RuntimeError:
        raise InputError("", KILLED) from None


def unreached(error: RuntimeError) -> InputError:
    """What a collective's `error` is to the user, where nobody has said that a process has failed."""
    if _GONE.search(str(error)):
        return InputError("", KILLED)
    said, cause = one_line(error), str(error).partition(_CAUSE)[2].strip()
    said += f": {one_line(RuntimeError(cause))}" if cause else ""
    return InputError("", f"processes of this job could not exchange tensors ({said}); start the job again to resume")


def end_with_others(store: Any, ended: threading.Event, leave: Callable[[Any], None]) -> None:
    """Until `ended`, end this process when another one has failed and this one doesn't come to its end by itself.

    For a thread: one that waits in a collective, or for others to make a group, can be ended in no other way.

    Args:
        leave: given a store, wait until the others have come to their ends as well: it may be this process that serves
            the store in which they find that somebody has said why.
    """
    own: Any = None
    with contextlib.suppress(RuntimeError):  # the launcher has gone
        own = store.clone()  # whoever waits for a key in the other one keeps it to itself
    while not ended.wait(5 * _POLL):
        try:
            failed = own is None or own.add(FAILURES, 0) + own.add(LOST, 0) > 0
        except RuntimeError:  # the launcher has gone
            failed = True
        if failed:
            if not ended.wait(_GRACE):
                with contextlib.suppress(RuntimeError):
                    if own is not None:
                        if own.add(FAILURES, 1) == 1:  # nobody else has said why
                            os.write(2, f"error: {KILLED}\n".encode())
                        leave(own)
                os._exit(2)
            return
