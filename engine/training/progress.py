"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""

log = logging.getLogger("gfmn")


class Progress:
    """Tells how much is done, how fast, and how long the rest takes. A context manager.

    Args:
        what: is worked at.
        total, done: of the whole, and of what was done before, in `unit`s.
        unit: what is counted, in the plural.
        show: False tells nothing.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, unit: str, show: bool = True):
        self.what, self.total, self.unit, self.show = what, total, unit, show
        self.done = self.start = done
        self.note = ""
        self.bar: tqdm | None = None
        if show and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", dynamic_ncols=True)
        self.begun = time.monotonic()
        self.next = self.begun + LINE_EVERY

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def tell(self, note: str) -> None:
        """Show `note` beside the numbers from now on."""
        self.note = note
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        now = time.monotonic()
        if not self.show or self.bar is not None or now < self.next:
            return
        self.next = now + LINE_EVERY
        rate = max(self.done - self.start, 1) / max(now - self.begun, 1e-9)
        left = (self.total - self.done) / rate
        line = f"{self.what}: {self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {left:.0f} s left"
        log.info("%s, %s", line, self.note) if self.note else log.info("%s", line)
