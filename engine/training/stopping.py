"""Ctrl-C between two steps instead of inside one."""

from __future__ import annotations

import signal
import sys
import threading
from types import TracebackType
from typing import Any


class StopRequest:
    """While entered, the first Ctrl-C (or SIGTERM) only sets `requested`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {
                number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)
