"""What downloads through torchvision have in common."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.digests import printable

log = logging.getLogger("gfmn")

DOWNLOAD_TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""


@contextlib.contextmanager
def quiet_network() -> Iterator[None]:
    """Give up on a silent server, and keep what torchvision prints off the terminal."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def fetching(root: Path, is_absent: Callable[[], bool]) -> Iterator[None]:
    """Inside, no other process downloads or unpacks into `root`; and none reads there if something `is_absent`, which
    may then be fetched. Who comes later waits, and finds it.

    The lock is on the folder itself, which is made if it is needed. Where there are no locks, nobody waits.
    """
    with contextlib.suppress(OSError):  # what the folder lacks is told by who looks for its files
        if is_absent():
            root.mkdir(parents=True, exist_ok=True)
    try:
        folder = os.open(root, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        _lock(folder, fcntl.LOCK_SH, root)
        if is_absent():
            _lock(folder, fcntl.LOCK_UN, root)
            _lock(folder, fcntl.LOCK_EX, root)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, kind: int, root: Path) -> None:
    try:
        fcntl.flock(folder, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("%s: another process is at it; waiting", printable(root))
        fcntl.flock(folder, kind)
    except OSError:
        pass
