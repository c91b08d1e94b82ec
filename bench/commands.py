"""Commands of the engine as processes of their own: what they used, and several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from engine.support.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Usage:
    """What a process used.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of all threads together; a busy machine makes it little longer.
        mebibytes: the most that it held.
    """

    seconds: float
    cpu_seconds: float
    mebibytes: float

    def __add__(self, other: Usage) -> Usage:
        """Of one process after the other."""
        most = max(self.mebibytes, other.mebibytes)
        return Usage(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds, most)


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        status: 0 if all went well.
        message: the last line of its stderr; "" if it was shown.
    """

    usage: Usage
    status: int
    message: str


def run_module(module: str, flags: Sequence[str], *, threads: int | None = None, shown: bool = False) -> Ended:
    """`python -m MODULE FLAGS…` until it ends, with so many threads; its stderr is `shown`, or kept for the message."""
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", module, *flags]
        with subprocess.Popen(command, stderr=None if shown else errors, env=environment) as process:
            try:
                _, status, used = os.wait4(process.pid, 0)
            except KeyboardInterrupt:  # the process has been told, too, and saves what it has
                _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    usage = Usage(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
    return Ended(usage, process.returncode, lines[-1] if lines else "")


def check(ended: Ended, what: str) -> None:
    """KeyboardInterrupt if the process was interrupted, InputError that begins with `what` if it failed."""
    if ended.status in (130, 143):
        raise KeyboardInterrupt
    if ended.status:
        raise InputError(f"{what} failed: {ended.message or 'see above'}")


def in_turn(work: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    """The results of `work`, in the order of `items`, of which `jobs` at a time are worked at.

    If one fails nothing else is begun; what runs already is waited for.
    """
    if jobs == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(jobs)
    try:
        for future in [pool.submit(work, item) for item in items]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
