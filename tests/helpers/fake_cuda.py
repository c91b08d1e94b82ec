"""Helper: what `bench.cuda` asks of a device, kept by a clock that only moves when it is told to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeCuda:
    """A device whose work is done at once.

    Attributes:
        now: seconds of device time.
        log: "wait", "mark", "capture" and whatever calls write to it, in order.
        traced: what `events` returns.
    """

    now: float = 0.0
    log: list[str] = field(default_factory=list)
    traced: Sequence[Any] = ()

    def on_stream(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def wait(self) -> None:
        self.log.append("wait")

    def mark(self) -> float:
        self.log.append("mark")
        return self.now

    def seconds_between(self, begin: float, end: float) -> float:
        return end - begin

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """Runs nothing now, and `call` at every replay."""
        self.log.append("capture")
        return call

    def events(self, call: Callable[[], object]) -> Sequence[Any]:
        call()
        return self.traced

    def busy(self, name: str, seconds: float) -> Callable[[], None]:
        """A call that takes the device `seconds`."""

        def call() -> None:
            self.log.append(name)
            self.now += seconds

        return call


@dataclass
class Event:
    """One of Kineto's events, with the methods that are used."""

    kind: str
    called: str
    begin: int = 0
    end: int = 0
    thread: int = 1
    own: int = 0
    launched_by: int = 0

    def activity_type(self) -> str:
        return self.kind

    def name(self) -> str:
        return self.called

    def start_ns(self) -> int:
        return self.begin

    def end_ns(self) -> int:
        return self.end

    def start_thread_id(self) -> int:
        return self.thread

    def correlation_id(self) -> int:
        return self.own

    def linked_correlation_id(self) -> int:
        return self.launched_by
