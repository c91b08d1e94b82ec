"""Commands of the engine as processes of their own: what they used, and several at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from engine.support.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

_LAUNCHER = """
import os, signal, sys, time
report, *command = sys.argv[1:]
told = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
before = signal.pthread_sigmask(signal.SIG_BLOCK, told)
begun = time.monotonic()
child = os.posix_spawn(command[0], command, os.environ, setsigmask=before)
def pass_on(number, frame):
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass
for number in told:  # Ctrl-C reaches the child without help
    signal.signal(number, (lambda *_: None) if number == signal.SIGINT else pass_on)
signal.pthread_sigmask(signal.SIG_SETMASK, before)
_, status, used = os.wait4(child, 0)
with open(report, "w") as file:
    print(time.monotonic() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, file=file)
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
"""
"""Starts a command and writes what it used. Linux counts the peak of whoever starts a process as the process's own, so
that must be something small."""

_REFUSED = 2
"""Exit code of an InputError (`engine.configuration.command`)."""
_running: dict[subprocess.Popen[bytes], bool] = {}
"""Launchers of `run_module` that have not ended, and whether they were told to stop."""


@dataclass(frozen=True)
class Usage:
    """What a process used.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of all threads together; a busy machine makes it little longer. None: a part of it is not known.
        mebibytes: the most that it held.
    """

    seconds: float
    cpu_seconds: float | None
    mebibytes: float

    def __add__(self, other: Usage) -> Usage:
        """Of one process after the other."""
        most = max(self.mebibytes, other.mebibytes)
        known = self.cpu_seconds is not None and other.cpu_seconds is not None
        cpu_seconds = self.cpu_seconds + other.cpu_seconds if known else None  # type: ignore[operator]
        return Usage(self.seconds + other.seconds, cpu_seconds, most)


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        status: 0 if all went well; 128 and the signal's number for one that ended it.
        message: the last line of its stderr; "" if it was shown.
        interrupted: this process was, and so told it to stop.
    """

    usage: Usage
    status: int
    message: str
    interrupted: bool = False


def run_module(module: str, flags: Sequence[str], *, threads: int | None = None, shown: bool = False) -> Ended:
    """`python -m MODULE FLAGS…` until it ends, with so many threads; its stderr is `shown`, or kept for the message.

    At KeyboardInterrupt the process is told to stop, and waited for, as it saves what it has.
    """
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    interrupted = False
    with tempfile.TemporaryFile() as errors, tempfile.NamedTemporaryFile("r") as report:
        command = [sys.executable, "-S", "-c", _LAUNCHER, report.name, sys.executable, "-m", module, *flags]
        with subprocess.Popen(command, stderr=None if shown else errors, env=environment) as process:
            _running[process] = False
            try:
                process.wait()
            except KeyboardInterrupt:
                interrupted = True
                stop_running()
                process.wait()
            finally:
                del _running[process]
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
        numbers = [float(number) for number in report.read().split()]
    message = lines[-1] if lines else ""
    if not numbers:
        raise InputError(f"python -m {module}: what it used is not known: {message or 'its launcher was killed'}")
    return Ended(Usage(*numbers), process.returncode, message, interrupted)


def stop_running() -> None:
    """Tell all processes of `run_module` to stop, each once."""
    for process, told in list(_running.items()):
        if not told:
            _running[process] = True
            process.terminate()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP are KeyboardInterrupt, as Ctrl-C is; a SIGHUP that is ignored (nohup's) stays so."""
    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class RunFailed(InputError):
    """A command of the engine ended with an error.

    Attributes:
        refused: by the engine's own word: its run diverged, or its flags were wrong. False for one that was killed or
            broke off.
    """

    def __init__(self, message: str, *, refused: bool = True):
        super().__init__(message)
        self.refused = refused


def check(ended: Ended, what: str) -> None:
    """KeyboardInterrupt if the process was interrupted, RunFailed that begins with `what` if it failed."""
    if ended.interrupted or ended.status - 128 in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        raise KeyboardInterrupt
    if ended.status:
        reason = ended.message or (f"exit code {ended.status}" if ended.status != _REFUSED else "see above")
        raise RunFailed(f"{what} failed: {reason}", refused=ended.status == _REFUSED)


def in_turn(work: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Generator[Result, None, None]:
    """The results of `work`, in the order of `items`, of which `jobs` at a time are worked at.

    If one fails nothing else is begun; what runs already is waited for. At KeyboardInterrupt, and when the iterator is
    closed, processes of `run_module` are told to stop.
    """
    if jobs == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(jobs)
    futures = [pool.submit(work, item) for item in items]
    try:
        for future in futures:
            yield future.result()
    except (KeyboardInterrupt, GeneratorExit):
        pool.shutdown(wait=False, cancel_futures=True)
        begun = [future for future in futures if not future.cancelled()]
        while wait(begun, timeout=0.2).not_done:  # again and again: one may just start its process
            stop_running()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
