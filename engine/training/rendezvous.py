"""How the processes of a job find each other: one line, after a limited time, says what was waited for in vain."""

from __future__ import annotations

import os
import socket
import time
import uuid
import zlib
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from engine.support.errors import InputError, one_line

LIMIT = "GFMN_JOIN_TIMEOUT"
"""The environment variable with the seconds that a process waits for the others of its job at the start."""
_SECONDS = 300.0
_POLL = 0.2


class EndedElsewhere(Exception):
    """Another process of this job has failed, and says why; this process exits silently."""


def join() -> tuple[int, int, dist.Store | None]:
    """This process's rank, the number of processes, and the store that they talk through; (0, 1, None) for only one.

    The launcher's own limits end when it has started the processes, and `limit` begins. If somebody doesn't come in
    that time, one of those that came raises InputError, the others EndedElsewhere.
    """
    rank, size = _place()
    if size == 1:
        return rank, size, None
    return rank, size, _meet(rank, size, limit())


def _meet(rank: int, size: int, seconds: float) -> dist.Store:
    """The store, when all processes have come to it.

    A launcher's store outlives the processes, which it starts again after a failure (max_restarts of torchrun), and the
    launchers of several machines count these attempts differently. So every process brings a word of its own; an
    attempt is the list of all words, which rank 0 publishes, and its keys have a place of their own.
    """
    end, word = time.monotonic() + seconds, uuid.uuid4().hex
    store = _connect(rank, size, seconds)
    keys = [f"joined {rank}" for rank in range(size)]
    try:
        late = store.add("late", 0)  # in earlier attempts
        store.set(keys[rank], word)
        while (attempt := _attempt(store, keys, rank, word)) is None:
            if store.add("late", 0) > late:
                raise EndedElsewhere
            if time.monotonic() >= end:
                _give_up(store, keys, rank, seconds, late)
            time.sleep(_POLL)
    except RuntimeError:
        raise InputError("", f"process {rank} of {size} lost the job's store while it waited for the others") from None
    return dist.PrefixStore(attempt, store)


def _attempt(store: dist.Store, keys: Sequence[str], rank: int, word: str) -> str | None:
    """A name for this attempt, when all processes know its words; a word of an earlier attempt may be among those that
    rank 0 finds first."""
    if not store.check(list(keys)):
        return None
    if rank == 0:
        store.set("words", " ".join(store.get(key).decode() for key in keys))
    elif not store.check(["words"]):
        return None
    published = store.get("words").decode()
    words = published.split(" ")
    if words[rank : rank + 1] != [word]:
        return None
    attempt = f"attempt {words[0]} {zlib.crc32(published.encode()):08x}"
    seen = [f"{attempt} {key}" for key in keys]
    store.set(seen[rank], "")
    return attempt if store.check(seen) else None


def _give_up(store: dist.Store, keys: Sequence[str], rank: int, seconds: float, late: int) -> None:
    if store.add("late", 1) > late + 1:
        raise EndedElsewhere
    missing = ", ".join(str(other) for other, key in enumerate(keys) if not store.check([key]))
    who = f"process {missing}" if missing else "processes to be started again,"  # which came to an earlier attempt
    time.sleep(3 * _POLL)  # the store may live in this process: let the others see that
    raise InputError(
        "",
        f"process {rank} waited {seconds:g} s for {who} of {len(keys)} (WORLD_SIZE), which did not come; "
        f"start all of them, or set {LIMIT} to more seconds",
    )


def limit() -> float:
    """How many seconds a process waits for the others at the start; InputError if the environment has no number."""
    text = os.environ.get(LIMIT, str(_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError("", f"the environment's {LIMIT} must be a number of seconds, got {text!r}")
    return seconds


def _place() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a launcher. InputError if they don't fit."""
    size = _number("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1
    if size < 2:
        return 0, 1
    rank = _number("RANK")
    if not 0 <= rank < size:
        raise InputError("", f"the environment says process {rank} (RANK) of {size} (WORLD_SIZE), which are from 0")
    return rank, size


def _connect(rank: int, size: int, seconds: float) -> dist.TCPStore:
    """The store at MASTER_ADDR and MASTER_PORT. The launcher serves it, or else rank 0, which then waits for nobody.

    InputError if it is not reached within `seconds`.
    """
    from torch.distributed.constants import default_pg_timeout  # here, because not every PyTorch has it

    host, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
    if not host:
        raise InputError("", _unset("MASTER_ADDR"))
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    serves = rank == 0 and not launched
    if not serves:
        _reach(host, port, seconds, f"process {rank} of {size}", "the launcher" if launched else "process 0")
    try:
        within = timedelta(seconds=seconds)
        store = dist.TCPStore(host, port, size, is_master=serves, timeout=within, wait_for_workers=False)
    except RuntimeError as error:
        act = "serve" if serves else "reach"
        raise InputError(
            "", f"process {rank} of {size} cannot {act} the job's store at {host}:{port} ({one_line(error)})"
        ) from None
    store.set_timeout(default_pg_timeout)
    return store


def _reach(host: str, port: int, seconds: float, who: str, server: str) -> None:
    """Wait until somebody listens at `host`:`port`. PyTorch would wait as well, with a page of its own words."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(end - time.monotonic(), _POLL)).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise InputError(
                    "",
                    f"{who} waited {seconds:g} s for {server} at {host}:{port} (MASTER_ADDR:MASTER_PORT), which cannot "
                    f"be reached ({error.strerror or one_line(error)}); start all processes, with the right address, "
                    f"or set {LIMIT} to more seconds",
                ) from None
            time.sleep(_POLL)


def _number(name: str) -> int:
    text = os.environ.get(name)
    if text is None:
        raise InputError("", _unset(name))
    try:
        return int(text)
    except ValueError:
        raise InputError("", f"the environment's {name} must be a whole number, got {text!r}") from None


def _unset(name: str) -> str:
    return f"the environment has WORLD_SIZE and no {name}; start with torchrun, or unset WORLD_SIZE for one process"
