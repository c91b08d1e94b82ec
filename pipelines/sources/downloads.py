"""What downloads through torchvision have in common."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Iterator

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
