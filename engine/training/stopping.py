"""Signals: a stop between two steps instead of inside one, and Ctrl-C that no import can swallow.

Imports no library, so that a command can ask for this before it imports any.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_AGAIN = 0.05
"""Seconds after which a Ctrl-C that came in the middle of an import is tried again."""


@contextlib.contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, `handler` handles these signals of the main thread. A SIGHUP that is ignored (nohup's) stays ignored.

    Not so SIGINT: shells have it ignored in what a script starts in the background, and a kill -INT means this process.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) is not None and not _is_nohup(number):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _is_nohup(number: signal.Signals) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """While entered, SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 only set `requested`; a second Ctrl-C interrupts.

    Args:
        patient: no Ctrl-C interrupts at once: launchers send the same signal more than once.

    Attributes:
        requested: whether a signal came.
        status: what the process exits with for it: 128 and the number of the first.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.requested, self.status, self.patient = False, 0, patient
        self._process = os.getpid()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        self._stack.enter_context(_handled(_STOPPING, self._request))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of this process, which decides for it
            return
        if self.requested and number == signal.SIGINT and not self.patient:
            raise KeyboardInterrupt
        if not self.requested and not self.patient:
            _say("\nstopping after this step; Ctrl-C stops at once")
        self.status = self.status or 128 + number
        self.requested = True


def exit_on_interrupt() -> None:
    """From here on Ctrl-C ends the process at once, with one line and 130.

    For a command before its `main`: importing its libraries takes seconds, and there is nothing to lose.
    """
    signal.signal(signal.SIGINT, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    _say("interrupted; nothing was half-written")
    os._exit(128 + number)


class Interrupts(contextlib.AbstractContextManager["Interrupts"]):
    """While entered, Ctrl-C raises KeyboardInterrupt, but in the middle of an import only when that is done.

    Libraries turn an interrupted import into all sorts of errors, ImportError among them: the library would look as if
    it was not installed. A second Ctrl-C, while the first one waits, ends the process.

    Attributes:
        raised: whether KeyboardInterrupt was raised; what any other error says after it is of no interest.
        waiting: whether a Ctrl-C waits for the end of an import.
    """

    def __init__(self) -> None:
        self.raised = self.waiting = self._again = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Interrupts:
        self._inside_import = _importing(sys._getframe())
        self._stack.enter_context(_handled([signal.SIGINT], self._interrupt))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        pressed, self._again = not self._again, False
        if pressed and self.waiting:
            _exit(number, frame)
        self.waiting = _importing(frame) and not self._inside_import
        if self.waiting:
            # Not a Timer: threading's locks may be what this signal interrupted.
            _thread.start_new_thread(self._try_again, ())
            return
        self.raised = True
        raise KeyboardInterrupt

    def _try_again(self) -> None:
        time.sleep(_AGAIN)
        self._again = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _say(line: str) -> None:
    """A line on standard error, whatever of it this signal interrupted, and whether there still is one."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
